#pragma once

#include <vector>

#include "graph/graph.h"

namespace flexcore {

/// Linears that read the same tensor become one node, and so do their bypasses: x is read once.
void fuse_shared_inputs(Graph& graph);

/// The reverse pass of a model's loss, appended to the graph.
struct BackwardGraph {
  std::vector<TensorId> layer_grad;  // by layer, and one more: gradient of the layer's input; kNoTensor where none is
                                     // needed. [num_layers] is the one that the loss head starts the chain with
  TensorId target_grad = kNoTensor;  // [kTargets] what the loss head leaves for the hidden state's rows
  int first_layer = 0;               // lowest layer with a backward
};

/// Derives the backward: gradients only where they lead to a trainable operator; frozen parameters get none (FlexLLM
/// section 5). Then removes, to a fixed point, nodes whose results nobody reads.
BackwardGraph derive_backward(Graph& graph);

/// What the backward of one layer does with a forward tensor that it reads.
enum class Keep : std::uint8_t { kKept, kRebuilt, kDropped, kInPages };

struct KeptTensor {
  TensorId tensor = kNoTensor;
  int layer = kNoLayer;  // whose backward reads it
  Keep keep = Keep::kDropped;
};

/// Keeps only the forward tensors that the backward reads; of those, rebuilds what cheap operators make from kept ones.
/// Adds the rebuilding nodes and rewires the backward to them. `nodes_of_layer[l]`: the layer's backward in order,
/// rebuilding first. Every forward tensor of the layers is in `kept`.
struct KeepPlan {
  std::vector<KeptTensor> kept;
  std::vector<std::vector<NodeId>> nodes_of_layer;
};
KeepPlan prune_and_rematerialize(Graph& graph, std::size_t num_forward_nodes);

}  // namespace flexcore
