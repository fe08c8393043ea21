#include "graph/backward_builder.h"
#include "graph/layer_ops.h"
#include "ops/cross_entropy.h"
#include "ops/rows.h"

namespace flexcore {

namespace {

class GatherOp final : public Operator {
 public:
  explicit GatherOp(RowSet rows) : rows_(rows) {}
  std::string_view name() const override { return "gather_rows"; }
  Coupling coupling() const override { return {.features = 1, .rows = true}; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const auto& index = rows_ == RowSet::kSampled ? state.batch->sampled_rows : state.batch->target_rows;
    flexcore::run(*state.context, GatherRowsArgs{in[0], index, out[0]});
  }
  // The gradient of the gathered rows is where the loss head ends: the engine scatters it to the sequences' own
  // gradients.
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad != kNoTensor) builder.pass(node.inputs[0], grad);
  }

 private:
  RowSet rows_;
};

class CrossEntropyOp final : public Operator {
 public:
  explicit CrossEntropyOp(ParamId weight) : weight_(weight) {}
  std::string_view name() const override { return "linear_cross_entropy"; }
  std::vector<ParamId> params() const override { return {weight_}; }
  bool effect() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const auto& batch = *state.batch;
    const bool loss_only = batch.grad_scale.data() == nullptr;
    flexcore::run(*state.context,
                  LinearCrossEntropyArgs{in[0], state.matrices[static_cast<std::size_t>(weight_)], batch.labels,
                                         batch.loss, batch.grad_scale, loss_only ? TensorView{} : out[0]});
  }
  // The forward made the gradient already.
  void vjp(BackwardBuilder& builder, const Node& node) const override { builder.pass(node.inputs[0], node.outputs[0]); }

 private:
  ParamId weight_;
};

}  // namespace

std::shared_ptr<const Operator> gather_op(RowSet rows) { return std::make_shared<GatherOp>(rows); }
std::shared_ptr<const Operator> cross_entropy_op(ParamId weight) { return std::make_shared<CrossEntropyOp>(weight); }

}  // namespace flexcore
