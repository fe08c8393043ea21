#include "graph/linear_op.h"

#include "graph/backward_builder.h"
#include "ops/linear.h"
#include "ops/rows.h"

namespace flexcore {

namespace {

const TensorView& vector_of(const RunState& state, ParamId id) { return state.vectors[static_cast<std::size_t>(id)]; }
const WeightView& matrix_of(const RunState& state, ParamId id) { return state.matrices[static_cast<std::size_t>(id)]; }

bool is_idle(const BatchState& batch, When when, SiteId site) {
  if (when == When::kAlways) return false;
  return batch.sites[static_cast<std::size_t>(site)].separated() != (when == When::kSeparated);
}

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

}  // namespace

bool LinearOp::idle(const BatchState& batch) const { return is_idle(batch, when_, site_); }

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

namespace {

class AddOp final : public Operator {
 public:
  AddOp(When when, SiteId site) : when_(when), site_(site) {}
  std::string_view name() const override { return "add"; }
  int alias(int) const override { return 0; }
  bool rebuildable() const override { return true; }
  bool idle(const BatchState& batch) const override { return is_idle(batch, when_, site_); }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, CopyArgs{in[1], out[0], GradMode::kAccumulate});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    for (const auto input : node.inputs) builder.pass(input, grad);
  }

 private:
  When when_;
  SiteId site_;
};

}  // namespace

std::shared_ptr<const Operator> add_op(When when, SiteId site) { return std::make_shared<AddOp>(when, site); }

}  // namespace flexcore
