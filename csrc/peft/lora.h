#pragma once

#include <span>

#include "graph/graph.h"

namespace flexcore {

/// Rewrites the graph: a LoRA bypass network at each of the sites, reading the linear's input and adding to its output
/// (FlexLLM section 4).
void attach_lora(Graph& graph, std::span<const SiteId> sites);

}  // namespace flexcore
