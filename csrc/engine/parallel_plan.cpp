#include "engine/parallel_plan.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <tuple>

#include "compile/parallel_bypass.h"
#include "core/check.h"
#include "peft/layout.h"

namespace flexcore {

namespace {

constexpr std::int64_t kMaxRanks = 1024;

}  // namespace

void check(const ParallelOptions& options) {
  require(options.tensor_parallel_size >= 1 && options.tensor_parallel_size <= kMaxRanks,
          "tensor_parallel_size: ", options.tensor_parallel_size, ", wanted 1 to ", kMaxRanks);
  const auto positive = [](double value, const char* name) { require(value > 0, name, ": ", value, ", wanted > 0"); };
  positive(options.rates.flops_per_second, "flops_per_second");
  positive(options.rates.memory_bytes_per_second, "memory_bytes_per_second");
  positive(options.rates.link_bytes_per_second, "link_bytes_per_second");
  require(options.rates.collective_seconds >= 0, "collective_seconds: ", options.rates.collective_seconds,
          ", wanted >= 0");
}

namespace {

std::string states_text(const std::vector<ParallelState>& states) {
  std::string text;
  for (const auto state : states) text += str(text.empty() ? "" : ">", tensor_text(state));
  return text;
}

class Planner {
 public:
  Planner(const ModelConfig& model, const EngineSizes& sizes, const CompiledModel& compiled, const ParallelWork& work,
          const ParallelOptions& options)
      : model_(model),
        sizes_(sizes),
        compiled_(compiled),
        work_(work),
        rates_(options.rates),
        ranks_(static_cast<int>(options.tensor_parallel_size)),
        backbone_options_{ranks_, options.sequence_parallel},
        backbone_(parallelize_backbone(compiled.base(), backbone_options_)) {
    plan_.tensor_parallel_size = options.tensor_parallel_size;
    plan_.sequence_parallel = options.sequence_parallel;
  }

  ParallelPlan run() {
    count_backbone();
    if (work_.program != nullptr) {
      count_training();
      const std::int64_t in_flight = plan_.gradients;  // of sequences, in the pool as what they save
      choose_bypasses();
      plan_.kv_pages = std::max<std::int64_t>(0, plan_.kv_pages - plan_.saved_activations - in_flight);
    }
    return std::move(plan_);
  }

 private:
  // Key and value heads that a rank's query heads read, of the rank that reads the most.
  std::int64_t kv_heads() const {
    const std::int64_t group = model_.num_heads / model_.num_kv_heads;
    std::int64_t most = 0;
    for (int r = 0; r < ranks_; ++r) {
      const Share heads = share_of(model_.num_heads, r, ranks_);
      most = std::max(most, (heads.end - 1) / group - heads.begin / group + 1);
    }
    return most;
  }

  double bytes_per_weight(bool quantizable) const {
    const WeightFormat& format = sizes_.linears;
    if (!quantizable || !format.quantized()) return static_cast<double>(dtype_size(sizes_.compute));
    return static_cast<double>(format.bits()) / 8 + 4.0 / static_cast<double>(format.group_size);
  }

  void count_backbone() {
    const Graph& graph = compiled_.base();
    for (std::size_t i = 0; i < graph.params.size(); ++i) {
      const auto& param = graph.params[i];
      const bool vector = param.in_features == 0;
      const auto local = vector
                             ? largest_local_shape(backbone_.params[i], 1, param.out_features, ranks_)
                             : largest_local_shape(backbone_.params[i], param.out_features, param.in_features, ranks_);
      plan_.weights += static_cast<std::int64_t>(static_cast<double>(local.size()) *
                                                 (vector ? sizeof(float) : bytes_per_weight(param.quantizable)));
    }
    plan_.kv_pages = work_.kv_pages / model_.num_kv_heads * kv_heads();
    for (const auto& moved : backbone_transitions(graph, backbone_)) {
      if (moved.phase != Phase::kTrunk) continue;
      (moved.backward ? plan_.backward_bytes_per_token : plan_.forward_bytes_per_token) +=
          bytes_sent_per_row(moved.transition, moved.features, moved.element_bytes, ranks_);
    }
  }

  void count_training() {
    const std::int64_t tokens = work_.tokens_in_flight;
    for (const auto& saved : work_.program->saved) {
      if (saved.in_host) continue;  // the rank's own
      const auto state = backbone_.tensors[static_cast<std::size_t>(in_base(saved.trunk))].used;
      const std::int64_t local = largest_local_shape(state, tokens, saved.width, ranks_).size();
      plan_.saved_activations += local * static_cast<std::int64_t>(saved.bytes_per_token()) / saved.width;
    }
    // Gradients of the residual stream, and of a layer's keys and values.
    const auto residual = plan_.sequence_parallel ? kRowSplit : kReplicated;
    plan_.gradients = static_cast<std::int64_t>(sizeof(float)) *
                      (largest_local_shape(residual, tokens, model_.hidden_size, ranks_).size() +
                       2 * tokens * kv_heads() * model_.head_dim);
  }

  // What the layers keep is in the serving graph, where bypasses have tensors of their own: "gate.scaled" is divided as
  // "gate" is.
  TensorId in_base(TensorId trunk) const {
    const GraphTensor& tensor = compiled_.trunk().graph().tensor(trunk);
    for (std::string name = tensor.name;; name.resize(name.rfind('.')))
      if (const TensorId found = compiled_.base().find(tensor.layer, name); found != kNoTensor) return found;
  }

  // The linear's input and output, or the one of them that the bypass reads and changes.
  SiteStates states_of(const Bypass& bypass) const {
    const SiteStates states = site_states(compiled_.base(), backbone_, bypass.site);
    if (bypass.kind == BypassKind::kLora) return states;
    const TensorId tensor = bypass.kind == BypassKind::kInputScale ? states.x_tensor : states.y_tensor;
    SiteStates own = bypass_states(compiled_.base(), backbone_, tensor, tensor);
    own.weight = states.weight;
    return own;
  }

  struct Kind {
    BypassForm form;
    SiteStates states;
    std::int64_t count = 0;
  };

  void choose_bypasses() {
    using Key = std::tuple<std::string, std::int64_t, std::int64_t, std::int64_t, std::string>;
    std::map<Key, std::size_t> index;
    std::vector<std::pair<std::string, Kind>> kinds;  // in the model's order
    for (const auto& module : work_.modules) {
      const std::string name = module.path.substr(module.path.rfind('.') + 1);
      const BypassForm form = form_of(module);
      const SiteStates states = states_of(module.bypass);
      const Key key{name, module.in_features, module.out_features, module.rank,
                    states_text(states.x) + states_text(states.y)};
      const auto [found, is_new] = index.try_emplace(key, kinds.size());
      if (is_new) kinds.push_back({name, {form, states}});
      ++kinds[found->second].second.count;
    }
    for (const auto& [name, kind] : kinds) choose(name, kind);
  }

  void choose(const std::string& name, const Kind& kind) {
    const Graph& graph = compiled_.base();
    const auto bytes = [&](TensorId id) { return static_cast<std::int64_t>(dtype_size(graph.tensor(id).dtype)); };
    const BypassSizes sizes{sizes_.limits.max_rows, work_.tokens_per_step, bytes(kind.states.x_tensor),
                            bytes(kind.states.y_tensor)};
    const BypassChoice choice = choose_plan(kind.form, kind.states, sizes, ranks_, rates_);
    const BypassCost& cost = choice.best().cost;
    ParallelSite site{.module = name,
                      .count = kind.count,
                      .weight = weight_text(kind.states.weight),
                      .x = states_text(kind.states.x),
                      .y = states_text(kind.states.y),
                      .candidates = static_cast<std::int64_t>(choice.candidates.size()),
                      .plan = summary(kind.form, choice.best().plan),
                      .reason = explain(kind.form, kind.states, choice.best().plan),
                      .forward_bytes_per_token = cost.forward_bytes,
                      .backward_bytes_per_token = cost.backward_bytes,
                      .step_bytes = cost.step_bytes,
                      .parameter_bytes = cost.parameter_bytes};
    std::vector<const BypassCandidate*> kept;
    for (const auto& candidate : choice.candidates) {
      if (candidate.dominated_by < 0) kept.push_back(&candidate);
      site.equal += candidate.equal;
    }
    std::stable_sort(kept.begin(), kept.end(), [&](const BypassCandidate* a, const BypassCandidate* b) {
      if ((a == &choice.best()) != (b == &choice.best())) return a == &choice.best();
      return a->cost.seconds < b->cost.seconds;
    });
    for (const auto* candidate : kept) {
      const BypassCost& c = candidate->cost;
      site.kept.push_back({summary(kind.form, candidate->plan), c.forward_seconds * 1e6, c.backward_seconds * 1e6,
                           c.step_seconds * 1e6, c.forward_bytes + c.backward_bytes,
                           static_cast<std::int64_t>(c.memory_bytes)});
    }
    plan_.sites.push_back(std::move(site));
    plan_.adapters += kind.count * 2 * cost.parameter_bytes;  // a version, and the next in the making
    plan_.gradients += kind.count * cost.gradient_bytes;
    plan_.optimizer += kind.count * cost.optimizer_bytes;
    plan_.saved_activations +=
        static_cast<std::int64_t>(static_cast<double>(kind.count * work_.tokens_in_flight) * cost.saved_bytes);
  }

  const ModelConfig& model_;
  const EngineSizes& sizes_;
  const CompiledModel& compiled_;
  const ParallelWork& work_;
  ParallelRates rates_;
  int ranks_;
  BackboneOptions backbone_options_;
  ParallelBackbone backbone_;
  ParallelPlan plan_;
};

}  // namespace

ParallelPlan plan_parallel(const ModelConfig& model, const EngineSizes& sizes, const CompiledModel& compiled,
                           const ParallelWork& work, const ParallelOptions& options) {
  return Planner(model, sizes, compiled, work, options).run();
}

std::string describe(const ParallelPlan& plan) {
  char line[512];
  std::snprintf(
      line, sizeof line,
      "\n%lld ranks%s: a rank has at most %.1f MB (weights %.1f, kv_pages %.1f, saved_activations %.1f, adapters "
      "%.1f, gradients %.1f, optimizer %.1f)\nand sends %.0f bytes a token forward and %.0f backward for the "
      "layers\n",
      static_cast<long long>(plan.tensor_parallel_size), plan.sequence_parallel ? ", residual split over tokens" : "",
      static_cast<double>(plan.total()) / 1e6, static_cast<double>(plan.weights) / 1e6,
      static_cast<double>(plan.kv_pages) / 1e6, static_cast<double>(plan.saved_activations) / 1e6,
      static_cast<double>(plan.adapters) / 1e6, static_cast<double>(plan.gradients) / 1e6,
      static_cast<double>(plan.optimizer) / 1e6, plan.forward_bytes_per_token, plan.backward_bytes_per_token);
  std::string text = line;
  for (const auto& site : plan.sites) {
    std::snprintf(line, sizeof line, "  %-10s W%-4s x%-4s y%-4s %5lld plans  ", site.module.c_str(),
                  site.weight.c_str(), site.x.c_str(), site.y.c_str(), static_cast<long long>(site.candidates));
    text += line + site.plan + "\n";
  }
  return text;
}

}  // namespace flexcore
