#include "graph/graph.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "ops/scatter.h"

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

DType Graph::kept_dtype(const GraphTensor& tensor) const {
  return keep_mode == KeepMode::kCodes && !tensor.keep_exact ? DType::kUInt8 : tensor.keep_dtype;
}

std::size_t Graph::kept_bytes(const GraphTensor& tensor) const {
  return static_cast<std::size_t>(kept_row_bytes(kept_dtype(tensor), tensor.width));
}

std::int64_t Graph::num_parameters() const {
  std::int64_t count = 0;
  for (const auto& param : params) count += param.out_features * std::max<std::int64_t>(param.in_features, 1);
  return count;
}

std::span<const LinearSite> Graph::layer_sites() const {
  const auto behind = std::find_if(sites.begin(), sites.end(),
                                   [](const LinearSite& site) { return site.place != LinearSite::Place::kLayer; });
  return {sites.begin(), behind};
}

SiteId Graph::site_at(LinearSite::Place place) const {
  const auto site = std::find_if(sites.begin(), sites.end(), [&](const LinearSite& s) { return s.place == place; });
  require<Error>(site != sites.end(), "graph: no such site");
  return static_cast<SiteId>(site - sites.begin());
}

TensorId Graph::find(int layer, std::string_view name) const {
  for (auto i = tensors.size(); i-- > 0;)
    if (tensors[i].layer == layer && tensors[i].name == name) return static_cast<TensorId>(i);
  return kNoTensor;
}

}  // namespace flexcore
