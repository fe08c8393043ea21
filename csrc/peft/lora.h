#pragma once

#include <span>

#include "graph/bypass.h"
#include "graph/graph.h"

namespace flexcore {

/// Rewrites the graph: a LoRA bypass network at each of the sites, reading the linear's input and adding to its output
/// (FlexLLM section 4).
void attach_lora(Graph& graph, std::span<const SiteId> sites);

/// The same network as steps, for planning: y += B (A x).
BypassForm lora_form(std::int64_t in_features, std::int64_t out_features, std::int64_t rank);

}  // namespace flexcore
