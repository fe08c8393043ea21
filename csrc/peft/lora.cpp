#include "peft/lora.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/check.h"
#include "graph/linear_op.h"

namespace flexcore {

void attach_lora(Graph& graph, std::span<const SiteId> sites) {
  std::map<std::string, SiteId> site_of_weight;
  for (const auto site : sites) {
    require(site >= 0 && static_cast<std::size_t>(site) < graph.sites.size(), "attach_lora: site ", site, " of ",
            graph.sites.size());
    site_of_weight[graph.sites[static_cast<std::size_t>(site)].path + ".weight"] = site;
  }
  std::vector<TensorId> current(graph.tensors.size());  // newest version of each tensor
  for (std::size_t i = 0; i < current.size(); ++i) current[i] = static_cast<TensorId>(i);
  auto old = std::exchange(graph.nodes, {});
  for (auto& node : old) {
    for (auto& input : node.inputs) input = current[static_cast<std::size_t>(input)];
    const auto linear = std::dynamic_pointer_cast<const LinearOp>(node.op);
    const Node base = node;
    graph.add_node(std::move(node));
    if (!linear || linear->members().size() != 1) continue;
    const auto& weight = graph.params[static_cast<std::size_t>(linear->members()[0].weight)].name;
    const auto site = site_of_weight.find(weight);
    if (site == site_of_weight.end()) continue;
    const TensorId y = base.outputs[0];
    const TensorId bypassed = graph.add_tensor(graph.tensor(y));
    current[static_cast<std::size_t>(y)] = bypassed;
    graph.add_node({std::make_shared<LoraOp>(std::vector<SiteId>{site->second}),
                    {base.inputs[0], y},
                    {bypassed},
                    base.layer,
                    base.phase});
  }
  graph.hidden = current[static_cast<std::size_t>(graph.hidden)];
  graph.logits = current[static_cast<std::size_t>(graph.logits)];
}

BypassForm lora_form(std::int64_t in_features, std::int64_t out_features, std::int64_t rank) {
  using Kind = BypassStep::Kind;
  return {{{Kind::kLinear, "A", in_features, rank}, {Kind::kLinear, "B", rank, out_features}}};
}

}  // namespace flexcore
