#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "compile/few.h"
#include "compile/passes.h"
#include "core/check.h"
#include "graph/layer_ops.h"

namespace flexcore {

namespace {

// Decides for one layer's backward. What is needed is there anyway, kept or made again, so it may serve to make
// another; tensor ids do not follow the order of execution (bypasses are added last), so nothing may hang on the order
// of decisions.
class LayerChoice {
 public:
  LayerChoice(const Graph& graph, int layer, std::set<TensorId> needed, const LayerKeep& keep)
      : graph_(graph), layer_(layer), needed_(std::move(needed)) {
    for (const auto tensor : needed_) {
      const std::string name = name_of(tensor);
      (rebuildable(tensor) ? rebuilt_ : keep.recomputed.contains(name) ? recomputed_ : kept_).insert(tensor);
      if (kept_.contains(tensor) && keep.offloaded.contains(name)) offloaded_.insert(tensor);
    }
    possible_ = std::all_of(recomputed_.begin(), recomputed_.end(), [&](TensorId tensor) { return want(tensor); });
    for (const auto tensor : rebuilt_) possible_ = want(tensor) && possible_;
    if (!possible_) return;
    for (const auto& [id, wanted] : wanted_) {
      const Node& node = graph_.nodes[static_cast<std::size_t>(id)];
      for (const int index : remake(node, wanted).inputs) ++readers_[node.inputs[static_cast<std::size_t>(index)]];
    }
  }
  const std::set<TensorId>& kept() const { return kept_; }            // anywhere
  const std::set<TensorId>& offloaded() const { return offloaded_; }  // of these, in host memory
  const std::set<TensorId>& rebuilt() const { return rebuilt_; }
  const std::set<TensorId>& recomputed() const { return recomputed_; }
  bool possible() const { return possible_; }

  KeptBytes kept_bytes() const {
    KeptBytes bytes;
    for (const auto tensor : kept_)
      (offloaded_.contains(tensor) ? bytes.host : bytes.device) += graph_.kept_bytes(graph_.tensor(tensor));
    return bytes;
  }
  /// As LayerKeep has it.
  std::string name_of(TensorId id) const {
    const GraphTensor& tensor = graph_.tensor(id);
    return tensor.layer == layer_ ? tensor.name : str(LayerKeep::kBelow, tensor.name);
  }
  double seconds(const OperatorRates& rates) const {
    double total = 0.0;
    for (const auto& [id, wanted] : wanted_) {
      const Node& node = graph_.nodes[static_cast<std::size_t>(id)];
      const Recompute made = remake(node, wanted);
      double bytes = 0.0;
      for (const auto& [indices, tensors] : {std::pair(&made.inputs, &node.inputs), {&made.outputs, &node.outputs}})
        for (const int index : *indices) {
          const GraphTensor& tensor = graph_.tensor((*tensors)[static_cast<std::size_t>(index)]);
          bytes += static_cast<double>(tensor.width) * static_cast<double>(dtype_size(tensor.dtype));
        }
      total += made.op->flops(graph_, rates.context) * rates.seconds_per_flop + bytes * rates.seconds_per_byte;
    }
    return total;
  }

  /// The tensor that holds `tensor` in the backward; adds the nodes that make it to the graph, which is the same.
  TensorId source(Graph& graph, TensorId tensor, std::vector<NodeId>& nodes) {
    if (kept_.contains(tensor)) return tensor;
    if (const auto made = copy_.find(tensor); made != copy_.end()) return made->second;
    const NodeId producer = graph.tensor(tensor).producer;
    const Node forward = graph.nodes[static_cast<std::size_t>(producer)];
    const Recompute made = remake(forward, wanted_.at(producer));
    std::vector<TensorId> inputs, outputs;
    for (const int index : made.inputs)
      inputs.push_back(source(graph, forward.inputs[static_cast<std::size_t>(index)], nodes));
    for (std::size_t o = 0; o < made.outputs.size(); ++o) {
      // What others read too is not overwritten.
      const int alias = made.op->alias(static_cast<int>(o));
      if (alias < 0 || !made.op->in_place_only()) continue;
      const TensorId taken = forward.inputs[static_cast<std::size_t>(made.inputs[static_cast<std::size_t>(alias)])];
      if (needed_.contains(taken) || readers_.at(taken) > 1) {
        TensorId& input = inputs[static_cast<std::size_t>(alias)];
        input = add(graph, copy_op(), {input}, {graph.tensor(taken)}, nodes)[0];
      }
    }
    std::vector<GraphTensor> like;
    for (const int index : made.outputs) like.push_back(graph.tensor(forward.outputs[static_cast<std::size_t>(index)]));
    outputs = add(graph, made.op, std::move(inputs), std::move(like), nodes);
    for (std::size_t o = 0; o < outputs.size(); ++o)
      copy_[forward.outputs[static_cast<std::size_t>(made.outputs[o])]] = outputs[o];
    return copy_.at(tensor);
  }

 private:
  std::vector<TensorId> add(Graph& graph, std::shared_ptr<const Operator> op, std::vector<TensorId> inputs,
                            std::vector<GraphTensor> outputs, std::vector<NodeId>& nodes) const {
    std::vector<TensorId> made;
    for (auto& output : outputs) {
      output.layer = layer_;
      made.push_back(graph.add_tensor(std::move(output)));
    }
    nodes.push_back(graph.add_node({std::move(op), std::move(inputs), made, layer_, Phase::kBackward}));
    return made;
  }
  const Node& producer(TensorId tensor) const {
    return graph_.nodes[static_cast<std::size_t>(graph_.tensor(tensor).producer)];
  }
  bool rebuildable(TensorId tensor) const {
    if (graph_.keep_mode < KeepMode::kLeast) return false;
    const auto& node = producer(tensor);
    if (!node.op->rebuildable() || node.outputs.size() != 1) return false;
    return std::all_of(node.inputs.begin(), node.inputs.end(),
                       [&](TensorId input) { return needed_.contains(input) || rebuildable(input); });
  }
  // The node again, with at least the wanted outputs.
  static Recompute remake(const Node& node, const std::vector<bool>& wanted) {
    if (!node.op->rebuildable()) return *node.op->recompute(wanted);
    Recompute whole{.op = node.op, .inputs = {}, .outputs = {0}};
    for (std::size_t i = 0; i < node.inputs.size(); ++i) whole.inputs.push_back(static_cast<int>(i));
    return whole;
  }
  // Notes which outputs of which nodes it takes to have `tensor`. False: it cannot be made from what is kept.
  bool want(TensorId tensor) {
    if (kept_.contains(tensor)) return true;
    const NodeId id = graph_.tensor(tensor).producer;
    const Node& node = graph_.nodes[static_cast<std::size_t>(id)];
    const bool cheap = node.op->rebuildable() && node.outputs.size() == 1;
    if (!cheap && node.layer != layer_) return false;
    std::vector<bool> only(node.outputs.size(), false);
    for (std::size_t o = 0; o < node.outputs.size(); ++o) only[o] = node.outputs[o] == tensor;
    if (!cheap && !node.op->recompute(only)) return false;
    auto& wanted = wanted_.try_emplace(id, node.outputs.size(), false).first->second;
    for (std::size_t o = 0; o < only.size(); ++o) wanted[o] = wanted[o] || only[o];
    const auto inputs = remake(node, only).inputs;
    return std::all_of(inputs.begin(), inputs.end(),
                       [&](int index) { return want(node.inputs[static_cast<std::size_t>(index)]); });
  }

  const Graph& graph_;
  int layer_;
  std::set<TensorId> needed_, kept_, offloaded_, rebuilt_, recomputed_;
  std::map<NodeId, std::vector<bool>> wanted_;  // outputs of nodes that are made again
  std::map<TensorId, int> readers_;             // among these nodes
  std::map<TensorId, TensorId> copy_;
  bool possible_ = true;
};

/// Of the forward's nodes alone.
std::vector<bool> forward_tensors(const Graph& graph, std::size_t num_forward_nodes) {
  std::vector<bool> is_forward(graph.tensors.size(), false);
  for (std::size_t i = 0; i < num_forward_nodes; ++i)
    for (const auto output : graph.nodes[i].outputs) is_forward[static_cast<std::size_t>(output)] = true;
  return is_forward;
}

struct LayerBackward {
  std::vector<NodeId> nodes;
  std::set<TensorId> needed;  // forward tensors that they read
};
LayerBackward backward_of(const Graph& graph, std::size_t num_forward_nodes, std::size_t num_nodes,
                          const std::vector<bool>& is_forward, int layer) {
  LayerBackward found;
  for (std::size_t i = num_forward_nodes; i < num_nodes; ++i) {
    const auto& node = graph.nodes[i];
    if (node.phase != Phase::kBackward || node.layer != layer) continue;
    found.nodes.push_back(static_cast<NodeId>(i));
    for (const auto input : node.inputs)
      if (is_forward[static_cast<std::size_t>(input)]) found.needed.insert(input);
  }
  return found;
}

// A layer that is unlike the others and cannot do without what is named keeps it.
std::unique_ptr<LayerChoice> choose(const Graph& graph, int layer, const std::set<TensorId>& needed,
                                    const LayerKeep& keep) {
  auto choice = std::make_unique<LayerChoice>(graph, layer, needed, keep);
  if (!choice->possible())
    choice =
        std::make_unique<LayerChoice>(graph, layer, needed, LayerKeep{.recomputed = {}, .offloaded = keep.offloaded});
  return choice;
}

/// Those of `options` for which no other keeps less, here and there, in less time; the fastest first.
std::vector<KeepOption> undominated(std::vector<KeepOption> options) {
  const auto order = [](const KeepOption& o) {
    return std::tuple(o.seconds_per_token, o.bytes_per_token.device, o.bytes_per_token.host);
  };
  std::stable_sort(options.begin(), options.end(),
                   [&](const KeepOption& a, const KeepOption& b) { return order(a) < order(b); });
  std::vector<KeepOption> best;
  for (auto& option : options) {
    const auto dominates = [&](const KeepOption& other) {
      return other.bytes_per_token.device <= option.bytes_per_token.device &&
             other.bytes_per_token.host <= option.bytes_per_token.host;
    };
    if (std::none_of(best.begin(), best.end(), dominates)) best.push_back(std::move(option));
  }
  return best;
}

}  // namespace

KeptBytes kept_bytes(const Graph& graph, std::size_t num_forward_nodes, int layer, const LayerKeep& keep) {
  const auto is_forward = forward_tensors(graph, num_forward_nodes);
  const auto backward = backward_of(graph, num_forward_nodes, graph.nodes.size(), is_forward, layer);
  return choose(graph, layer, backward.needed, keep)->kept_bytes();
}

std::vector<KeepOption> keep_options(const Graph& graph, std::size_t num_forward_nodes, int layer,
                                     const OperatorRates& rates) {
  const auto is_forward = forward_tensors(graph, num_forward_nodes);
  const auto needed = backward_of(graph, num_forward_nodes, graph.nodes.size(), is_forward, layer).needed;
  const LayerChoice nothing(graph, layer, needed, LayerKeep{});
  const double least = nothing.seconds(rates);
  const auto size = [&](TensorId tensor) { return graph.kept_bytes(graph.tensor(tensor)); };
  const auto by_size = [&](const std::set<TensorId>& tensors) {
    std::vector<TensorId> sorted(tensors.begin(), tensors.end());
    std::stable_sort(sorted.begin(), sorted.end(), [&](TensorId a, TensorId b) { return size(a) > size(b); });
    return sorted;
  };
  // Each alone, so that the choice is exact; where a method has a layer keep very many, the smallest go together.
  constexpr std::size_t kMostParts = 11;
  std::vector<std::vector<std::string>> parts;
  for (const auto tensor : by_size(nothing.kept())) {
    if (graph.tensor(tensor).layer != layer) continue;
    if (parts.size() < kMostParts) parts.emplace_back();
    parts.back().push_back(graph.tensor(tensor).name);
  }
  std::vector<KeepOption> options;
  for (std::size_t subset = 0; subset < std::size_t{1} << parts.size(); ++subset) {
    LayerKeep keep;
    for (std::size_t n = 0; n < parts.size(); ++n)
      if (subset >> n & 1) keep.recomputed.insert(parts[n].begin(), parts[n].end());
    const LayerChoice choice(graph, layer, needed, keep);
    if (!choice.possible()) continue;
    const double seconds = choice.seconds(rates) - least;
    KeptBytes bytes = choice.kept_bytes();
    options.push_back({keep, bytes, seconds});
    if (rates.seconds_per_host_byte == 0.0) continue;
    for (const auto tensor : by_size(choice.kept())) {
      keep.offloaded.insert(choice.name_of(tensor));
      bytes.device -= size(tensor), bytes.host += size(tensor);
      options.push_back({keep, bytes, seconds + 2.0 * static_cast<double>(bytes.host) * rates.seconds_per_host_byte});
    }
  }
  return few(undominated(std::move(options)), [](const KeepOption& option) { return option.bytes_per_token; });
}

KeepPlan prune_and_rematerialize(Graph& graph, std::size_t num_forward_nodes, const std::vector<LayerKeep>& keep) {
  const std::size_t num_nodes = graph.nodes.size();
  const auto layers = static_cast<std::size_t>(graph.num_layers);
  KeepPlan plan;
  plan.nodes_of_layer.resize(layers);
  const auto is_forward = forward_tensors(graph, num_forward_nodes);

  std::set<std::pair<TensorId, int>> seen;
  for (std::size_t l = 0; l < layers; ++l) {
    const int layer = static_cast<int>(l);
    const auto backward = backward_of(graph, num_forward_nodes, num_nodes, is_forward, layer);
    const auto choice = choose(graph, layer, backward.needed, keep.empty() ? LayerKeep{} : keep[l]);
    const auto list = [&](const std::set<TensorId>& tensors, Keep keep) {
      for (const auto tensor : tensors) plan.kept.push_back({tensor, layer, keep});
    };
    for (const auto tensor : choice->kept())
      plan.kept.push_back({tensor, layer, choice->offloaded().contains(tensor) ? Keep::kOffloaded : Keep::kKept});
    list(choice->rebuilt(), Keep::kRebuilt);
    list(choice->recomputed(), Keep::kRecomputed);
    for (const auto tensor : backward.needed) seen.emplace(tensor, layer);

    auto& nodes = plan.nodes_of_layer[l];
    for (const auto id : backward.nodes) {
      auto inputs = graph.nodes[static_cast<std::size_t>(id)].inputs;
      for (auto& input : inputs)
        if (static_cast<std::size_t>(input) < is_forward.size() && is_forward[static_cast<std::size_t>(input)])
          input = choice->source(graph, input, nodes);
      graph.nodes[static_cast<std::size_t>(id)].inputs = std::move(inputs);
      nodes.push_back(id);
    }
  }
  // Everything else that a layer's forward makes, for the explanation. Only the newest version of a tensor counts.
  for (std::size_t t = 0; t < is_forward.size(); ++t) {
    const auto id = static_cast<TensorId>(t);
    const auto& tensor = graph.tensor(id);
    if (!is_forward[t] || tensor.layer == kNoLayer || seen.contains({id, tensor.layer})) continue;
    const bool newest = [&] {
      for (auto later = t + 1; later < is_forward.size(); ++later)
        if (is_forward[later] && graph.tensors[later].layer == tensor.layer && graph.tensors[later].name == tensor.name)
          return false;
      return true;
    }();
    const bool read_next = seen.contains({id, tensor.layer + 1});
    const Keep how = graph.keep_mode == KeepMode::kAll ? Keep::kKept
                     : tensor.in_pages                 ? Keep::kInPages
                                                       : Keep::kDropped;
    if (newest && !read_next) plan.kept.push_back({id, tensor.layer, how});
  }
  return plan;
}

}  // namespace flexcore
