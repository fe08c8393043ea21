#include "compile/compiled_model.h"

#include <algorithm>
#include <utility>

#include "compile/few.h"
#include "core/check.h"

namespace flexcore {

namespace {

std::vector<NodeId> nodes_in(const Graph& graph, Phase phase) {
  std::vector<NodeId> nodes;
  for (std::size_t i = 0; i < graph.nodes.size(); ++i)
    if (graph.nodes[i].phase == phase) nodes.push_back(static_cast<NodeId>(i));
  return nodes;
}

bool is_saved(const KeptTensor& kept) { return kept.keep == Keep::kKept || kept.keep == Keep::kOffloaded; }

void save_kept(TrainingProgram& program, const Graph& graph, const KeepPlan& plan, const Graph& trunk) {
  program.saved_of_trunk.resize(trunk.tensors.size());
  for (const auto& kept : plan.kept) {
    const auto& tensor = graph.tensor(kept.tensor);
    program.choices.push_back({tensor.name, kept.layer, kept.keep, graph.kept_bytes(tensor)});
    if (!is_saved(kept)) continue;
    const TensorId in_trunk = trunk.find(tensor.layer, tensor.name);
    require<Error>(in_trunk != kNoTensor, "training program: ", tensor.name, " is not made by the forward program");
    program.saved_of_trunk[static_cast<std::size_t>(in_trunk)].push_back(static_cast<int>(program.saved.size()));
    program.saved.push_back({in_trunk, kept.layer, tensor.width, graph.kept_dtype(tensor), tensor.keep_dtype,
                             kept.keep == Keep::kOffloaded, 0});
  }
  // What is a whole number of vectors comes first, so that it is aligned whatever the sequence's length.
  for (const bool whole : {true, false})
    for (auto& saved : program.saved) {
      if ((saved.bytes_per_token() % 16 == 0) != whole) continue;
      KeptBytes& all = program.saved_bytes_per_token;
      std::size_t& before = saved.in_host ? all.host : all.device;
      saved.offset = before;
      before += saved.bytes_per_token();
    }
}

}  // namespace

CompiledModel::CompiledModel(Graph base, AttachBypasses attach, const RowCounts& capacity, bool join)
    : base_(std::move(base)), attach_(std::move(attach)), capacity_(capacity), join_(join) {
  auto graph = std::make_shared<Graph>(base_);
  attach_(*graph, nullptr);
  fuse_shared_inputs(*graph);
  const std::shared_ptr<const Graph> serving = graph;
  trunk_ = Program(serving, nodes_in(*serving, Phase::kTrunk), {}, {serving->hidden}, capacity, join);
  sample_head_ =
      Program(serving, nodes_in(*serving, Phase::kSampleHead), {serving->hidden}, {serving->logits}, capacity, join);
  score_head_ = Program(serving, nodes_in(*serving, Phase::kLossHead), {serving->hidden}, {}, capacity, join);
  workspace_bytes_ = trunk_.workspace_bytes() + std::max(sample_head_.workspace_bytes(), score_head_.workspace_bytes());
}

BypassSet CompiledModel::lora_everywhere() const {
  BypassSet bypasses;
  for (std::size_t i = 0; i < base_.layer_sites().size(); ++i)
    bypasses.insert({static_cast<SiteId>(i), BypassKind::kLora});
  return bypasses;
}

CompiledModel::Draft CompiledModel::draft(const BypassSet& bypasses) const {
  Draft draft;
  draft.graph = std::make_shared<Graph>(base_);
  attach_(*draft.graph, &bypasses);
  fuse_shared_inputs(*draft.graph);
  draft.num_forward = draft.graph->nodes.size();
  const SiteId output = base_.site_at(LinearSite::Place::kOutput);
  draft.backward = derive_backward(
      *draft.graph,
      std::any_of(bypasses.begin(), bypasses.end(), [&](const Bypass& bypass) { return bypass.site == output; }));
  require(draft.backward.target_grad != kNoTensor, "training program: no linear has a trainable bypass");
  return draft;
}

// Of a layer that is like most: not the lowest with a backward, nor the last.
const CompiledModel::Options& CompiledModel::options(const BypassSet& bypasses) {
  const auto known = options_.find(bypasses);
  if (known != options_.end()) return known->second;
  const Draft d = draft(bypasses);
  const int layer = std::min(d.backward.first_layer + 1, d.graph->num_layers - 1);
  Options found;
  found.of_layer = keep_options(*d.graph, d.num_forward, layer, rates_);
  for (int l = 0; l < d.graph->num_layers; ++l) {
    auto& bytes = found.kept_bytes.emplace_back();
    for (const auto& option : found.of_layer) bytes.push_back(kept_bytes(*d.graph, d.num_forward, l, option.keep));
  }
  found.candidates = list_candidates(found);
  return options_.emplace(bypasses, std::move(found)).first->second;
}

const std::vector<CompiledModel::Candidate>& CompiledModel::keep_candidates(const BypassSet& bypasses) {
  return options(bypasses).candidates;
}

// With so much in host memory; a layer that is unlike the others keeps less there.
double CompiledModel::seconds_of(const KeepOption& option, const KeptBytes& kept) const {
  return option.seconds_per_token -
         2.0 * rates_.seconds_per_host_byte *
             (static_cast<double>(option.bytes_per_token.host) - static_cast<double>(kept.host));
}

std::vector<CompiledModel::Candidate> CompiledModel::list_candidates(const Options& options) const {
  constexpr std::int64_t kParts = 4;  // quarters of the layers: every choice is a program of its own
  const auto& all = options.of_layer;
  const std::int64_t layers = base_.num_layers;
  std::set<KeepChoice> choices;
  for (int i = 0; i < static_cast<int>(all.size()); ++i) {
    choices.insert({i, i, 0});
    for (int j = i + 1; j < static_cast<int>(all.size()); ++j)
      for (std::int64_t part = 1; part < kParts; ++part)
        if (const std::int64_t first = layers * part / kParts; first > 0) choices.insert({j, i, first});
  }
  std::vector<Candidate> candidates;
  for (const auto& choice : choices) {
    Candidate& candidate = candidates.emplace_back(choice);
    for (std::int64_t l = 0; l < layers; ++l) {
      const auto option = static_cast<std::size_t>(l < choice.num_first ? choice.first : choice.others);
      const KeptBytes& kept = options.kept_bytes[static_cast<std::size_t>(l)][option];
      candidate.bytes_per_token.device += kept.device;
      candidate.bytes_per_token.host += kept.host;
      candidate.seconds_per_token += seconds_of(all[option], kept);
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.seconds_per_token < b.seconds_per_token; });
  return few(std::move(candidates), [](const Candidate& candidate) { return candidate.bytes_per_token; });
}

TrainingProgram& CompiledModel::training(const BypassSet& bypasses, const KeepChoice& choice) {
  auto& entry = training_[{bypasses, choice}];
  if (entry) return *entry;
  auto program = std::make_unique<TrainingProgram>();
  const Draft d = draft(bypasses);
  const auto& graph = d.graph;
  const std::size_t num_forward = d.num_forward;
  const TensorId hidden = graph->hidden;
  const BackwardGraph& backward = d.backward;
  std::vector<LayerKeep> keep;
  if (choice != KeepChoice{}) {
    const auto& all = options(bypasses).of_layer;
    double extra = 0.0, whole = 0.0;
    for (int l = 0; l < graph->num_layers; ++l) {
      const auto option = static_cast<std::size_t>(l < choice.num_first ? choice.first : choice.others);
      keep.push_back(all[option].keep);
      if (l >= d.backward.first_layer) extra += seconds_of(all[option], {});
    }
    for (const Node& node : graph->nodes)
      if (node.phase == Phase::kBackward && node.layer != kNoLayer)
        whole += node.op->flops(*graph, rates_.context) * rates_.seconds_per_flop;
    program->backward_cost = 1.0 + extra / whole;
  }
  const KeepPlan plan = prune_and_rematerialize(*graph, num_forward, keep);
  save_kept(*program, *graph, plan, trunk_.graph());

  program->first_layer = backward.first_layer;
  program->target_grad = backward.target_grad;
  program->loss_head =
      Program(graph, nodes_in(*graph, Phase::kLossHead), {hidden}, {backward.target_grad}, capacity_, join_);
  program->workspace_bytes = program->loss_head.workspace_bytes();
  program->layers.resize(static_cast<std::size_t>(graph->num_layers));
  for (int l = backward.first_layer; l < graph->num_layers; ++l) {
    auto& layer = program->layers[static_cast<std::size_t>(l)];
    std::vector<TensorId> inputs = {backward.layer_grad[static_cast<std::size_t>(l) + 1]};
    std::size_t index = 0;
    for (const auto& kept : plan.kept) {
      if (!is_saved(kept)) continue;
      if (kept.layer == l) {
        inputs.push_back(kept.tensor);
        layer.saved.push_back(static_cast<int>(index));
      }
      ++index;
    }
    std::size_t gathered = static_cast<std::size_t>(graph->tensor(inputs[0]).width) * sizeof(float);
    for (const int index : layer.saved) {
      const SavedTensor& saved = program->saved[static_cast<std::size_t>(index)];
      gathered += static_cast<std::size_t>(saved.width) * dtype_size(saved.read_dtype);
    }
    program->gather_bytes_per_token = std::max(program->gather_bytes_per_token, gathered);
    layer.grad_out = backward.layer_grad[static_cast<std::size_t>(l)];
    std::vector<TensorId> outputs;
    if (layer.grad_out != kNoTensor) outputs.push_back(layer.grad_out);
    layer.program =
        Program(graph, plan.nodes_of_layer[static_cast<std::size_t>(l)], std::move(inputs), outputs, capacity_, join_);
    program->workspace_bytes = std::max(program->workspace_bytes, layer.program.workspace_bytes());
  }
  for (const auto& saved : program->saved) trunk_.observe(saved.trunk);
  entry = std::move(program);
  return *entry;
}

}  // namespace flexcore
