#pragma once

#include "graph/bypass.h"
#include "graph/graph.h"

namespace flexcore {

/// Rewrites the graph: the bypass networks of the set join their linears (FlexLLM section 4). Null: every kind at every
/// linear, idle in a batch that has none of them, so that base-only batches pay nothing.
void attach_bypasses(Graph& graph, const BypassSet* bypasses);

}  // namespace flexcore
