#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "compile/passes.h"

namespace flexcore {

namespace {

// Decides for one layer's backward. What is needed is there anyway, kept or rebuilt, so it may serve to rebuild
// another; tensor ids do not follow the order of execution (bypasses are added last), so nothing may hang on the order
// of decisions.
class LayerChoice {
 public:
  LayerChoice(Graph& graph, std::set<TensorId> needed) : graph_(graph), needed_(std::move(needed)) {
    for (const auto tensor : needed_) (rebuildable(tensor) ? rebuilt_ : kept_).insert(tensor);
  }
  const std::set<TensorId>& kept() const { return kept_; }
  const std::set<TensorId>& rebuilt() const { return rebuilt_; }

  // The tensor that holds `tensor` in the backward; adds the nodes that make it.
  TensorId source(TensorId tensor, int layer, std::vector<NodeId>& nodes) {
    if (kept_.contains(tensor)) return tensor;
    if (const auto made = copy_.find(tensor); made != copy_.end()) return made->second;
    const Node forward = graph_.nodes[static_cast<std::size_t>(graph_.tensor(tensor).producer)];
    Node node = forward;
    node.layer = layer;
    node.phase = Phase::kBackward;
    for (auto& input : node.inputs) input = source(input, layer, nodes);
    GraphTensor rebuilt = graph_.tensor(tensor);
    rebuilt.layer = layer;
    node.outputs = {graph_.add_tensor(std::move(rebuilt))};
    copy_[tensor] = node.outputs[0];
    nodes.push_back(graph_.add_node(std::move(node)));
    return copy_[tensor];
  }

 private:
  bool rebuildable(TensorId tensor) const {
    const auto& node = graph_.nodes[static_cast<std::size_t>(graph_.tensor(tensor).producer)];
    if (!node.op->rebuildable() || node.outputs.size() != 1) return false;
    return std::all_of(node.inputs.begin(), node.inputs.end(),
                       [&](TensorId input) { return needed_.contains(input) || rebuildable(input); });
  }

  Graph& graph_;
  std::set<TensorId> needed_, kept_, rebuilt_;
  std::map<TensorId, TensorId> copy_;
};

}  // namespace

KeepPlan prune_and_rematerialize(Graph& graph, std::size_t num_forward_nodes) {
  const std::size_t num_nodes = graph.nodes.size();
  const auto layers = static_cast<std::size_t>(graph.num_layers);
  KeepPlan plan;
  plan.nodes_of_layer.resize(layers);

  std::vector<bool> is_forward(graph.tensors.size(), false);
  for (std::size_t i = 0; i < num_forward_nodes; ++i)
    for (const auto output : graph.nodes[i].outputs) is_forward[static_cast<std::size_t>(output)] = true;

  std::set<std::pair<TensorId, int>> seen;
  for (std::size_t l = 0; l < layers; ++l) {
    std::vector<NodeId> backward;
    std::set<TensorId> needed;
    for (std::size_t i = num_forward_nodes; i < num_nodes; ++i) {
      const auto& node = graph.nodes[i];
      if (node.phase != Phase::kBackward || node.layer != static_cast<int>(l)) continue;
      backward.push_back(static_cast<NodeId>(i));
      for (const auto input : node.inputs)
        if (is_forward[static_cast<std::size_t>(input)]) needed.insert(input);
    }
    LayerChoice choice(graph, needed);
    for (const auto tensor : choice.kept()) plan.kept.push_back({tensor, static_cast<int>(l), Keep::kKept});
    for (const auto tensor : choice.rebuilt()) plan.kept.push_back({tensor, static_cast<int>(l), Keep::kRebuilt});
    for (const auto tensor : needed) seen.emplace(tensor, static_cast<int>(l));

    auto& nodes = plan.nodes_of_layer[l];
    for (const auto id : backward) {
      auto inputs = graph.nodes[static_cast<std::size_t>(id)].inputs;
      for (auto& input : inputs)
        if (static_cast<std::size_t>(input) < is_forward.size() && is_forward[static_cast<std::size_t>(input)])
          input = choice.source(input, static_cast<int>(l), nodes);
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
    if (newest && !read_next)
      plan.kept.push_back({id, tensor.layer, tensor.in_pages ? Keep::kInPages : Keep::kDropped});
  }
  return plan;
}

}  // namespace flexcore
