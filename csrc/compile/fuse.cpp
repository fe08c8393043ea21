#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <utility>

#include "compile/passes.h"
#include "graph/bypass_ops.h"
#include "graph/linear_op.h"

namespace flexcore {

namespace {

// The second linear moves up to the first: it reads nothing else.
std::optional<Node> merged_linear(const Node& a, const Node& b) {
  const auto x = std::dynamic_pointer_cast<const LinearOp>(a.op), y = std::dynamic_pointer_cast<const LinearOp>(b.op);
  if (!x || !y || !x->plain() || !y->plain() || a.inputs != b.inputs || a.layer != b.layer || a.phase != b.phase)
    return {};
  auto members = x->members();
  members.insert(members.end(), y->members().begin(), y->members().end());
  Node node = a;
  node.op = std::make_shared<LinearOp>(std::move(members), false);
  node.outputs.insert(node.outputs.end(), b.outputs.begin(), b.outputs.end());
  return node;
}

// The second bypass moves up to the first, so nothing between may make what it reads, or read what it overwrites.
std::optional<Node> merged_lora(const std::vector<Node>& nodes, std::size_t i, std::size_t j) {
  const Node &a = nodes[i], &b = nodes[j];
  const auto x = std::dynamic_pointer_cast<const LoraOp>(a.op), y = std::dynamic_pointer_cast<const LoraOp>(b.op);
  if (!x || !y || x->kind() != y->kind() || a.inputs[0] != b.inputs[0] || a.layer != b.layer) return {};
  const auto has = [](const std::vector<TensorId>& tensors, TensorId tensor) {
    return std::find(tensors.begin(), tensors.end(), tensor) != tensors.end();
  };
  for (std::size_t k = i; k < j; ++k) {
    for (const auto output : nodes[k].outputs)
      if (has(b.inputs, output)) return {};
    if (k > i && has(nodes[k].inputs, b.inputs[1])) return {};
  }
  auto sites = x->sites();
  sites.insert(sites.end(), y->sites().begin(), y->sites().end());
  Node node = a;
  node.op = std::make_shared<LoraOp>(std::move(sites), x->kind());
  node.inputs.insert(node.inputs.end(), b.inputs.begin() + 1, b.inputs.end());
  node.outputs.insert(node.outputs.end(), b.outputs.begin(), b.outputs.end());
  return node;
}

}  // namespace

void fuse_shared_inputs(Graph& graph) {
  auto nodes = std::exchange(graph.nodes, {});
  constexpr std::size_t kReach = 16;  // nodes between two linears of one input, bypasses included
  for (std::size_t i = 0; i < nodes.size(); ++i)
    for (std::size_t j = i + 1; j < std::min(nodes.size(), i + 1 + kReach);) {
      if (auto node = merged_linear(nodes[i], nodes[j])) {
        nodes[i] = std::move(*node);
        nodes.erase(nodes.begin() + static_cast<std::ptrdiff_t>(j));
      } else {
        ++j;
      }
    }
  for (std::size_t i = 0; i < nodes.size(); ++i)
    for (std::size_t j = i + 1; j < std::min(nodes.size(), i + 1 + kReach);) {
      if (auto node = merged_lora(nodes, i, j)) {
        nodes[i] = std::move(*node);
        nodes.erase(nodes.begin() + static_cast<std::ptrdiff_t>(j));
      } else {
        ++j;
      }
    }
  for (auto& node : nodes) graph.add_node(std::move(node));
}

}  // namespace flexcore
