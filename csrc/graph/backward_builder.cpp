#include "graph/backward_builder.h"

#include <utility>

#include "core/check.h"

namespace flexcore {

BackwardBuilder::BackwardBuilder(Graph& graph, std::vector<bool> needs_grad)
    : graph_(graph), needs_grad_(std::move(needs_grad)) {
  grad_.assign(needs_grad_.size(), kNoTensor);
  deferred_.resize(needs_grad_.size());
}

void BackwardBuilder::begin(const Node& forward) {
  layer_ = forward.layer;
  phase_ = forward.phase == Phase::kLossHead ? Phase::kLossHead : Phase::kBackward;
}

TensorId BackwardBuilder::grad(TensorId forward) {
  const auto i = static_cast<std::size_t>(forward);
  require<Error>(deferred_[i].empty(), "backward of ", graph_.tensor(forward).name,
                 ": only accumulating contributions, nothing to add them to");
  return grad_[i];
}

TensorId BackwardBuilder::new_grad(TensorId forward, DType dtype) {
  GraphTensor tensor = graph_.tensor(forward);
  tensor.name = "grad." + tensor.name;
  tensor.dtype = dtype;
  tensor.layer = layer_;
  tensor.in_pages = false;
  return graph_.add_tensor(std::move(tensor));
}

void BackwardBuilder::add(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs,
                          std::vector<TensorId> outputs) {
  graph_.add_node({std::move(op), std::move(inputs), std::move(outputs), layer_, phase_});
}

void BackwardBuilder::contribute(TensorId forward, DType dtype, std::vector<TensorId> inputs, const MakeOp& make) {
  if (!needs(forward)) return;
  const auto i = static_cast<std::size_t>(forward);
  const bool accumulate = grad_[i] != kNoTensor;
  if (accumulate) {
    inputs.push_back(grad_[i]);
    dtype = graph_.tensor(grad_[i]).dtype;
  }
  const TensorId out = new_grad(forward, dtype);
  add(make(accumulate), std::move(inputs), {out});
  grad_[i] = out;
  for (auto& emit : std::exchange(deferred_[i], {})) emit();
}

TensorId BackwardBuilder::cut(TensorId forward, TensorId replacement) {
  return std::exchange(grad_[static_cast<std::size_t>(forward)], replacement);
}

void BackwardBuilder::contribute_after(TensorId forward, std::function<void()> emit) {
  const auto i = static_cast<std::size_t>(forward);
  if (grad_[i] != kNoTensor)
    emit();
  else
    deferred_[i].push_back(std::move(emit));
}

void BackwardBuilder::pass(TensorId forward, TensorId gradient) {
  if (!needs(forward)) return;
  const auto i = static_cast<std::size_t>(forward);
  require<Error>(grad_[i] == kNoTensor, "backward of ", graph_.tensor(forward).name, ": passed through twice");
  grad_[i] = gradient;
}

void BackwardBuilder::emit(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs,
                           const std::vector<TensorId>& forwards, DType dtype) {
  std::vector<TensorId> outputs;
  for (const auto forward : forwards) {
    outputs.push_back(new_grad(forward, dtype));
    if (needs(forward)) grad_[static_cast<std::size_t>(forward)] = outputs.back();
  }
  add(std::move(op), std::move(inputs), std::move(outputs));
}

void BackwardBuilder::emit_effect(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs) {
  add(std::move(op), std::move(inputs), {});
}

}  // namespace flexcore
