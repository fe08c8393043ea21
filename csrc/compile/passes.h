#pragma once

#include <set>
#include <string>
#include <string_view>
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
/// section 5). Then removes, to a fixed point, nodes whose results nobody reads. `trains_output`: the loss head adds to
/// an adapter of the output layer, so it runs even where no layer needs a gradient.
BackwardGraph derive_backward(Graph& graph, bool trains_output = false);

/// What the backward of one layer does with a forward tensor that it reads: rebuilt by cheap operators, recomputed by a
/// GEMM or attention.
enum class Keep : std::uint8_t { kKept, kOffloaded, kRebuilt, kRecomputed, kDropped, kInPages };

struct KeptTensor {
  TensorId tensor = kNoTensor;
  int layer = kNoLayer;  // whose backward reads it
  Keep keep = Keep::kDropped;
};

/// What a layer does not keep on the device: tensors of these names are recomputed, or kept in host memory. One of the
/// layer below is named with kBelow before it.
struct LayerKeep {
  static constexpr std::string_view kBelow = "below.";
  std::set<std::string> recomputed, offloaded;
};

struct KeptBytes {
  std::size_t device = 0, host = 0;
};

struct KeepOption {
  LayerKeep keep;
  KeptBytes bytes_per_token;
  double seconds_per_token = 0.0;  // that recomputing takes, and the ways to host memory and back
};

/// What operators take, from the step-time model.
struct OperatorRates {
  double seconds_per_flop = 1e-11, seconds_per_byte = 1e-10;
  double seconds_per_host_byte = 0.0;  // of a copy to host memory, or back; 0: nothing is kept there
  double context = 512;                // positions that a row attends to
};

/// Of a layer's backward, choices of tensors for which no other keeps less, here and there, in less time; the fastest,
/// which keeps all on the device, first. What is recomputed is exact: all subsets are looked at. Of what is kept the
/// largest go to host memory first, as their time is the same by the byte; of choices with host memory there are `few`.
std::vector<KeepOption> keep_options(const Graph& graph, std::size_t num_forward_nodes, int layer,
                                     const OperatorRates& rates);

/// Bytes a token that prune_and_rematerialize keeps for a layer.
KeptBytes kept_bytes(const Graph& graph, std::size_t num_forward_nodes, int layer, const LayerKeep& keep);

/// Keeps only the forward tensors that the backward reads; of those, rebuilds what cheap operators make from kept ones,
/// and recomputes or offloads in layer l what `keep[l]` names (empty: nothing in any layer). Adds the nodes for it and
/// rewires the backward to them. `nodes_of_layer[l]`: the layer's backward in order. Every forward tensor of the layers
/// is in `kept`.
struct KeepPlan {
  std::vector<KeptTensor> kept;
  std::vector<std::vector<NodeId>> nodes_of_layer;
};
KeepPlan prune_and_rematerialize(Graph& graph, std::size_t num_forward_nodes, const std::vector<LayerKeep>& keep);

}  // namespace flexcore
