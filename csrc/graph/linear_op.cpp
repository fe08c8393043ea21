#include "graph/linear_op.h"

#include "graph/backward_builder.h"
#include "ops/linear.h"
#include "ops/lora.h"

namespace flexcore {

namespace {

const TensorView& vector_of(const RunState& state, ParamId id) { return state.vectors[static_cast<std::size_t>(id)]; }
const WeightView& matrix_of(const RunState& state, ParamId id) { return state.matrices[static_cast<std::size_t>(id)]; }

constexpr double kUsualRank = 16;  // a program serves adapters of every rank

double product_flops(const Graph& graph, ParamId id) {
  const GraphParam& weight = graph.params[static_cast<std::size_t>(id)];
  return 2.0 * static_cast<double>(weight.out_features) * static_cast<double>(weight.in_features);
}

// Inputs: gradients of every member's y [, gradient to add to]. Output: gradient of x.
class LinearBackwardOp final : public Operator {
 public:
  LinearBackwardOp(std::vector<ParamId> weights, bool accumulate)
      : weights_(std::move(weights)), accumulate_(accumulate) {}
  std::string_view name() const override { return "linear_backward"; }
  int alias(int) const override { return accumulate_ ? static_cast<int>(weights_.size()) : -1; }
  double flops(const Graph& graph, double) const override {
    double total = 0.0;
    for (const auto weight : weights_) total += product_flops(graph, weight);
    return total;
  }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    std::vector<LinearBackwardArgs::Member> members;
    for (std::size_t i = 0; i < weights_.size(); ++i) members.push_back({matrix_of(state, weights_[i]), in[i]});
    flexcore::run(*state.context,
                  LinearBackwardArgs{members, out[0], accumulate_ ? GradMode::kAccumulate : GradMode::kWrite});
  }

 private:
  std::vector<ParamId> weights_;
  bool accumulate_;
};

// Inputs: x, gradients of every site's y [, gradient of x to add to]. Outputs: that gradient, or none. Adds to grad_a,
// grad_b of the segments.
class LoraBackwardOp final : public Operator {
 public:
  LoraBackwardOp(std::vector<SiteId> sites, bool input_grad) : sites_(std::move(sites)), input_grad_(input_grad) {}
  std::string_view name() const override { return "lora_backward"; }
  int alias(int) const override { return input_grad_ ? static_cast<int>(sites_.size()) + 1 : -1; }
  bool effect() const override { return true; }
  // x A^T again, and the gradients of A and x; those of B and of x A^T.
  double flops(const Graph& graph, double) const override {
    double total = 0.0;
    for (const auto site : sites_) {
      const LinearSite& linear = graph.sites[static_cast<std::size_t>(site)];
      total += 2.0 * kUsualRank * static_cast<double>(3 * linear.in_features + 2 * linear.out_features);
    }
    return total;
  }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    std::vector<LoraBackwardArgs::Member> members;
    for (std::size_t i = 0; i < sites_.size(); ++i) {
      const auto& segments = state.batch->lora[static_cast<std::size_t>(sites_[i])];
      if (!segments.empty()) members.push_back({in[i + 1], segments});
    }
    if (!members.empty())
      flexcore::run(*state.context, LoraBackwardArgs{in[0], members, input_grad_ ? out[0] : TensorView{}});
  }

 private:
  std::vector<SiteId> sites_;
  bool input_grad_;
};

}  // namespace

void LinearOp::run(const RunState& state, const Node&, std::span<const TensorView> in,
                   std::span<const TensorView> out) const {
  std::vector<LinearArgs::Member> members;
  members.reserve(members_.size());
  for (std::size_t i = 0; i < members_.size(); ++i)
    members.push_back({.weight = matrix_of(state, members_[i].weight),
                       .bias = members_[i].bias == kNoParam ? TensorView{} : vector_of(state, members_[i].bias),
                       .y = out[i],
                       .mode = residual_ ? GradMode::kAccumulate : GradMode::kWrite});
  flexcore::run(*state.context, LinearArgs{in[0], members});
}

void LinearOp::vjp(BackwardBuilder& builder, const Node& node) const {
  std::vector<ParamId> weights;
  std::vector<TensorId> grads;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const TensorId grad = builder.grad(node.outputs[i]);
    if (grad == kNoTensor) continue;
    weights.push_back(members_[i].weight);
    grads.push_back(grad);
  }
  if (grads.empty()) return;
  builder.contribute(node.inputs[0], DType::kFloat32, grads,
                     [&](bool accumulate) { return std::make_shared<LinearBackwardOp>(weights, accumulate); });
  if (residual_) builder.pass(node.inputs[1], grads[0]);
}

std::vector<ParamId> LinearOp::params() const {
  std::vector<ParamId> params;
  for (const auto& member : members_) {
    params.push_back(member.weight);
    if (member.bias != kNoParam) params.push_back(member.bias);
  }
  return params;
}

std::optional<Recompute> LinearOp::recompute(const std::vector<bool>& wanted) const {
  Recompute result{.inputs = {0}};
  if (residual_) result.inputs.push_back(1);
  std::vector<Member> members;
  for (std::size_t i = 0; i < members_.size(); ++i) {
    if (!wanted[i]) continue;
    members.push_back(members_[i]);
    result.outputs.push_back(static_cast<int>(i));
  }
  result.op = std::make_shared<LinearOp>(std::move(members), residual_);
  return result;
}

double LinearOp::flops(const Graph& graph, double) const {
  double total = 0.0;
  for (const auto& member : members_) total += product_flops(graph, member.weight);
  return total;
}

std::optional<Recompute> LoraOp::recompute(const std::vector<bool>& wanted) const {
  Recompute result{.inputs = {0}};
  std::vector<SiteId> sites;
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    if (!wanted[i]) continue;
    sites.push_back(sites_[i]);
    result.inputs.push_back(static_cast<int>(i) + 1);
    result.outputs.push_back(static_cast<int>(i));
  }
  result.op = std::make_shared<LoraOp>(std::move(sites));
  return result;
}

double LoraOp::flops(const Graph& graph, double) const {
  double features = 0.0;
  for (const auto site : sites_) {
    const LinearSite& linear = graph.sites[static_cast<std::size_t>(site)];
    features += static_cast<double>(linear.in_features + linear.out_features);
  }
  return 2.0 * kUsualRank * features;
}

void LoraOp::run(const RunState& state, const Node&, std::span<const TensorView> in,
                 std::span<const TensorView> out) const {
  std::vector<LoraArgs::Member> members;
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    const auto& segments = state.batch->lora[static_cast<std::size_t>(sites_[i])];
    if (!segments.empty()) members.push_back({out[i], segments});
  }
  if (!members.empty()) flexcore::run(*state.context, LoraArgs{in[0], members});
}

void LoraOp::vjp(BackwardBuilder& builder, const Node& node) const {
  std::vector<SiteId> sites;
  std::vector<TensorId> inputs = {node.inputs[0]};
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    const TensorId grad = builder.grad(node.outputs[i]);
    if (grad == kNoTensor) continue;
    sites.push_back(sites_[i]);
    inputs.push_back(grad);
    builder.pass(node.inputs[1 + i], grad);
  }
  if (sites.empty()) return;
  const TensorId x = node.inputs[0];
  if (!builder.needs(x)) {
    builder.emit_effect(std::make_shared<LoraBackwardOp>(sites, false), inputs);
    return;
  }
  // The kernel only adds to grad x; the base linear writes it first.
  builder.contribute_after(x, [&builder, x, sites, inputs] {
    builder.contribute(x, DType::kFloat32, inputs, [&](bool) { return std::make_shared<LoraBackwardOp>(sites, true); });
  });
}

}  // namespace flexcore
