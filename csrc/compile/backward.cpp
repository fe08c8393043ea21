#include <algorithm>
#include <utility>

#include "compile/passes.h"
#include "graph/backward_builder.h"

namespace flexcore {

namespace {

bool contains(const std::vector<TensorId>& tensors, TensorId tensor) {
  return std::find(tensors.begin(), tensors.end(), tensor) != tensors.end();
}

std::vector<bool> find_needs_grad(const Graph& graph, bool trains_output) {
  std::vector<bool> needs(graph.tensors.size(), false);
  for (const auto& node : graph.nodes) {
    const bool any = node.op->trainable() || std::any_of(node.inputs.begin(), node.inputs.end(), [&](TensorId input) {
                       return needs[static_cast<std::size_t>(input)];
                     });
    if (any || (trains_output && contains(node.outputs, graph.hidden)))
      for (const auto output : node.outputs) needs[static_cast<std::size_t>(output)] = true;
  }
  return needs;
}

void remove_dead(Graph& graph, std::size_t first, const std::vector<TensorId>& wanted) {
  std::vector<bool> read(graph.tensors.size(), false);
  for (const auto tensor : wanted)
    if (tensor != kNoTensor) read[static_cast<std::size_t>(tensor)] = true;
  std::vector<bool> alive(graph.nodes.size(), true);
  for (auto i = graph.nodes.size(); i-- > first;) {
    const auto& node = graph.nodes[i];
    alive[i] = node.op->effect() || std::any_of(node.outputs.begin(), node.outputs.end(), [&](TensorId output) {
                 return read[static_cast<std::size_t>(output)];
               });
    if (alive[i])
      for (const auto input : node.inputs) read[static_cast<std::size_t>(input)] = true;
  }
  auto nodes = std::exchange(graph.nodes, {});
  for (std::size_t i = 0; i < nodes.size(); ++i)
    if (alive[i]) graph.add_node(std::move(nodes[i]));
}

}  // namespace

BackwardGraph derive_backward(Graph& graph, bool trains_output) {
  const std::size_t num_forward = graph.nodes.size();
  BackwardGraph result;
  result.layer_grad.assign(static_cast<std::size_t>(graph.num_layers) + 1, kNoTensor);
  result.first_layer = graph.num_layers;
  const auto needs = find_needs_grad(graph, trains_output);
  if (!needs[static_cast<std::size_t>(graph.hidden)]) return result;

  BackwardBuilder builder(graph, needs);
  const auto run_vjp = [&](std::size_t i) {
    const Node node = graph.nodes[i];  // a copy: nodes are appended meanwhile
    builder.begin(node);
    node.op->vjp(builder, node);
  };
  for (auto i = num_forward; i-- > 0;)
    if (graph.nodes[i].phase == Phase::kLossHead) run_vjp(i);

  // The units take over from here: the gradient of the hidden state's rows comes from the sequence's own store.
  GraphTensor hidden = graph.tensor(graph.hidden);
  hidden.name = "grad.hidden";
  hidden.layer = graph.num_layers;
  TensorId chain = graph.add_tensor(hidden);
  result.target_grad = builder.cut(graph.hidden, chain);
  result.layer_grad.back() = chain;

  // The tensor that a layer hands to the next is the last one written by it.
  std::vector<TensorId> layer_input(static_cast<std::size_t>(graph.num_layers), kNoTensor);
  TensorId last = kNoTensor;
  int layer = kNoLayer;
  for (std::size_t i = 0; i < num_forward; ++i) {
    const auto& node = graph.nodes[i];
    if (node.phase != Phase::kTrunk) continue;
    if (node.layer != layer) {
      if (node.layer != kNoLayer) layer_input[static_cast<std::size_t>(node.layer)] = last;
      layer = node.layer;
    }
    last = node.outputs[0];
  }
  for (auto i = num_forward; i-- > 0;) {
    const auto& node = graph.nodes[i];
    if (node.phase != Phase::kTrunk || node.layer == kNoLayer) continue;
    const std::size_t before = graph.nodes.size();
    const int node_layer = node.layer;
    run_vjp(i);
    if (graph.nodes.size() > before) result.first_layer = std::min(result.first_layer, node_layer);
  }
  // An adapter of the output layer alone: the last layer's unit has nothing to do.
  result.first_layer = std::min(result.first_layer, graph.num_layers - 1);
  for (int l = result.first_layer; l < graph.num_layers; ++l) {
    const TensorId input = layer_input[static_cast<std::size_t>(l)];
    if (builder.needs(input)) result.layer_grad[static_cast<std::size_t>(l)] = builder.grad(input);
  }
  auto wanted = result.layer_grad;
  wanted.push_back(result.target_grad);
  remove_dead(graph, num_forward, wanted);
  return result;
}

}  // namespace flexcore
