#include <algorithm>

#include "graph/backward_builder.h"
#include "graph/graph.h"
#include "graph/layer_ops.h"
#include "ops/rows.h"
#include "ops/scatter.h"

namespace flexcore {

namespace {

class PromptOp final : public Operator {
 public:
  std::string_view name() const override { return "prompt"; }
  int alias(int) const override { return 0; }
  bool rebuildable() const override { return true; }
  bool trainable() const override { return true; }
  bool idle(const BatchState& batch) const override {
    return std::none_of(batch.virtual_rows.begin(), batch.virtual_rows.end(),
                        [](const VirtualRows& rows) { return static_cast<bool>(rows.prompt); });
  }
  void run(const RunState& state, const Node&, std::span<const TensorView>,
           std::span<const TensorView> out) const override {
    for (const auto& rows : state.batch->virtual_rows)
      if (rows.prompt) flexcore::run(*state.context, CopyArgs{rows.prompt, out[0].rows(rows.begin, rows.end)});
  }
};

/// Columns of a layer's keys (half 0) or values in what a prefix has.
TensorView part_of(const TensorView& prefix, int layer, std::int64_t half, std::int64_t width) {
  TensorView part(prefix.as<float>() + (2 * layer + half) * width, DType::kFloat32, {prefix.shape(0), width});
  part.set_stride(0, prefix.stride(0));
  return part;
}

// in: grad k, grad v; out: the same without the rows of virtual tokens, in place, or none. Adds to the rows' grad.
class PrefixBackwardOp final : public Operator {
 public:
  explicit PrefixBackwardOp(bool input_grad) : input_grad_(input_grad) {}
  std::string_view name() const override { return "prefix_backward"; }
  int alias(int output) const override { return output; }
  bool effect() const override { return true; }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const std::int64_t width = in[0].shape(1);
    for (const auto& rows : state.batch->virtual_rows) {
      if (!rows.prefix) continue;
      const Arena::Scope scope(*state.context->scratch);
      const TensorView zeros = state.context->scratch->tensor(DType::kFloat32, {rows.end - rows.begin, width});
      flexcore::run(*state.context, ZeroArgs{zeros});
      for (const int half : {0, 1}) {
        const auto i = static_cast<std::size_t>(half);
        flexcore::run(*state.context, CopyArgs{in[i].rows(rows.begin, rows.end),
                                               part_of(rows.grad, node.layer, half, width), GradMode::kAccumulate});
        if (input_grad_) flexcore::run(*state.context, CopyArgs{zeros, out[i].rows(rows.begin, rows.end)});
      }
    }
  }

 private:
  bool input_grad_;
};

class PrefixOp final : public Operator {
 public:
  std::string_view name() const override { return "prefix"; }
  int alias(int output) const override { return output; }
  bool trainable() const override { return true; }
  bool idle(const BatchState& batch) const override {
    return std::none_of(batch.virtual_rows.begin(), batch.virtual_rows.end(),
                        [](const VirtualRows& rows) { return static_cast<bool>(rows.prefix); });
  }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    for (const auto& rows : state.batch->virtual_rows)
      for (const int half : {0, 1})
        if (rows.prefix)
          flexcore::run(*state.context, CopyArgs{part_of(rows.prefix, node.layer, half, in[0].shape(1)),
                                                 out[static_cast<std::size_t>(half)].rows(rows.begin, rows.end)});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad_k = builder.grad(node.outputs[0]), grad_v = builder.grad(node.outputs[1]);
    if (grad_k == kNoTensor) return;
    const bool needed = builder.needs(node.inputs[0]);
    const auto op = std::make_shared<PrefixBackwardOp>(needed);
    if (needed)
      builder.emit(op, {grad_k, grad_v}, node.inputs, builder.graph().tensor(grad_k).dtype);
    else
      builder.emit_effect(op, {grad_k, grad_v});
  }
};

}  // namespace

std::shared_ptr<const Operator> prompt_op() { return std::make_shared<PromptOp>(); }
std::shared_ptr<const Operator> prefix_op() { return std::make_shared<PrefixOp>(); }

}  // namespace flexcore
