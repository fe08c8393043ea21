#pragma once

#include <optional>
#include <vector>

#include "compile/parallel_transition.h"
#include "graph/graph.h"

namespace flexcore {

/// States of a tensor and of its gradient; where two differ there is a transition between.
struct ParallelTensor {
  ParallelState made = kReplicated;             // as its node computes it
  ParallelState used = kReplicated;             // as its readers read it
  std::optional<ParallelState> grad_made = {};  // as its readers leave it, all of them added; none: no gradient
  std::optional<ParallelState> grad_used = {};  // as its node's backward reads it
};

/// A model's tensor-parallel plan without bypasses: Megatron-LM's (Shoeybi et al., arXiv 1909.08053, section 3).
/// Linears that read the whole hidden state are split over out (by heads where heads follow), those that read what is
/// split over in, and their sums are taken on the way to the residual stream: two all-reduces a layer and direction.
struct ParallelBackbone {
  int ranks = 1;
  bool split_residual = false;
  std::vector<ParallelTensor> tensors;  // by TensorId
  std::vector<ParallelState> params;    // by ParamId; a vector's as if it was [1, size]
};

struct BackboneOptions {
  int ranks = 1;
  /// The residual stream and its norms are split over tokens: each all-reduce becomes a reduce-scatter and an
  /// all-gather of the same bytes, and less is kept (Korthikanti et al., arXiv 2205.05198, section 4.2.2).
  bool split_residual = false;
};

/// States follow from the operators' couplings and the rules of parallel_state.h. Query heads and the MLP's features
/// have to divide by the ranks: Unsupported names the module if they do not. Key and value heads that do not are made
/// on every rank, which reads those of its own query heads. The vocabulary is split unevenly where it does not divide.
ParallelBackbone parallelize_backbone(const Graph& graph, const BackboneOptions& options);

/// A transition of the backbone itself.
struct BackboneTransition {
  TensorId tensor = kNoTensor;
  Phase phase = Phase::kTrunk;  // of the tensor's node, also where its gradient is moved
  bool backward = false;
  Transition transition;
  RowSet rows = RowSet::kTokens;
  std::int64_t features = 0, element_bytes = 0;
};
/// All of them, those that move nothing left out. The loss of a split vocabulary takes two more all-reduces: the
/// largest logit of every row, then the sum of exponentials and the target's logit.
std::vector<BackboneTransition> backbone_transitions(const Graph& graph, const ParallelBackbone& backbone);

/// What a bypass at a linear can read and join without moving anything: the states in which the backbone has the
/// linear's input, its output and their gradients, before and after its own transitions.
struct SiteStates {
  ParallelState weight = kReplicated;         // of the linear
  std::vector<ParallelState> x, y;            // the first as made, then as used where that is another
  std::vector<ParallelState> grad_y, grad_x;  // likewise
  TensorId x_tensor = kNoTensor, y_tensor = kNoTensor;
};
SiteStates site_states(const Graph& graph, const ParallelBackbone& backbone, SiteId site);
/// The same for a bypass from any tensor to any other, or to itself.
SiteStates bypass_states(const Graph& graph, const ParallelBackbone& backbone, TensorId x, TensorId y);

}  // namespace flexcore
