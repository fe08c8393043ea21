#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "graph/graph.h"

namespace flexcore {

/// Appends a graph's backward to it, one node's vjp at a time, last node first. Gradients of tensors with several
/// readers are summed in place: the first contribution writes, the others accumulate.
class BackwardBuilder {
 public:
  /// `needs_grad` says of each forward tensor whether its gradient leads to a trainable parameter.
  BackwardBuilder(Graph& graph, std::vector<bool> needs_grad);

  bool needs(TensorId forward) const { return needs_grad_[static_cast<std::size_t>(forward)]; }
  /// Gradient tensor of a forward tensor, all contributions so far included; kNoTensor when nothing reached it.
  TensorId grad(TensorId forward);

  /// Makes the operator of one contribution; it is told whether to add to an existing gradient.
  using MakeOp = std::function<std::shared_ptr<const Operator>(bool accumulate)>;
  /// A contribution to `forward`'s gradient: the node reads `inputs`, and the existing gradient last when it
  /// accumulates.
  void contribute(TensorId forward, DType dtype, std::vector<TensorId> inputs, const MakeOp& make);
  /// A contribution whose kernel can only accumulate: held back until another one has written.
  void contribute_after(TensorId forward, std::function<void()> emit);
  /// The gradient of `forward` is that of another tensor, unchanged (residual, in-place update).
  void pass(TensorId forward, TensorId gradient);
  /// A node with its own outputs: one new gradient a forward tensor.
  void emit(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs, const std::vector<TensorId>& forwards,
            DType dtype);
  void emit_effect(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs);

  /// Ends the chain at `forward`: what has reached it is returned, and the nodes to come start from `replacement`.
  TensorId cut(TensorId forward, TensorId replacement);

  void begin(const Node& forward);  // the nodes to come belong to this one's layer and phase
  const Graph& graph() const { return graph_; }

 private:
  TensorId new_grad(TensorId forward, DType dtype);
  void add(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs, std::vector<TensorId> outputs);

  Graph& graph_;
  std::vector<bool> needs_grad_;
  std::vector<TensorId> grad_;
  std::vector<std::vector<std::function<void()>>> deferred_;
  int layer_ = kNoLayer;
  Phase phase_ = Phase::kBackward;
};

}  // namespace flexcore
