#include "graph/graph.h"

#include <utility>

namespace flexcore {

TensorId Graph::add_tensor(GraphTensor tensor) {
  tensors.push_back(std::move(tensor));
  return static_cast<TensorId>(tensors.size()) - 1;
}

NodeId Graph::add_node(Node node) {
  const auto id = static_cast<NodeId>(nodes.size());
  for (const auto output : node.outputs) tensors[static_cast<std::size_t>(output)].producer = id;
  nodes.push_back(std::move(node));
  return id;
}

TensorId Graph::find(int layer, std::string_view name) const {
  for (auto i = tensors.size(); i-- > 0;)
    if (tensors[i].layer == layer && tensors[i].name == name) return static_cast<TensorId>(i);
  return kNoTensor;
}

}  // namespace flexcore
