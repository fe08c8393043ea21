#include "graph/layer_ops.h"

#include <tuple>

#include "graph/backward_builder.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/rows.h"
#include "ops/silu_mul.h"

namespace flexcore {

namespace {

class EmbeddingOp final : public Operator {
 public:
  explicit EmbeddingOp(ParamId weight) : weight_(weight) {}
  std::string_view name() const override { return "embedding"; }
  Coupling coupling() const override { return {.features = 1, .rows = false}; }
  std::vector<ParamId> params() const override { return {weight_}; }
  bool rebuildable() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView>,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context,
                  EmbeddingArgs{state.batch->token_ids, state.matrices[static_cast<std::size_t>(weight_)], out[0]});
  }

 private:
  ParamId weight_;
};

TensorView grouped(const TensorView& x, std::int64_t group) {
  return x.shape(1) == group ? x : x.reshape({x.shape(0) * (x.shape(1) / group), group});
}

class CopyOp final : public Operator {
 public:
  std::string_view name() const override { return "copy"; }
  Coupling coupling() const override { return {.features = 1, .rows = false}; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, CopyArgs{in[0], out[0]});
  }
};

class RmsNormBackwardOp final : public Operator {
 public:
  RmsNormBackwardOp(ParamId weight, std::int64_t group, float eps, bool accumulate)
      : weight_(weight), group_(group), eps_(eps), accumulate_(accumulate) {}
  std::string_view name() const override { return "rms_norm_backward"; }
  bool takes_gaps(std::int64_t width) const override { return width == group_; }
  int alias(int) const override { return accumulate_ ? 2 : -1; }
  // in: grad y, x [, gradient to add to]
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context,
                  RmsNormBackwardArgs{grouped(in[0], group_), grouped(in[1], group_),
                                      state.vectors[static_cast<std::size_t>(weight_)], grouped(out[0], group_), eps_,
                                      accumulate_ ? GradMode::kAccumulate : GradMode::kWrite});
  }

 private:
  ParamId weight_;
  std::int64_t group_;
  float eps_;
  bool accumulate_;
};

class RmsNormOp final : public Operator {
 public:
  RmsNormOp(ParamId weight, std::int64_t group, float eps) : weight_(weight), group_(group), eps_(eps) {}
  std::string_view name() const override { return "rms_norm"; }
  Coupling coupling() const override { return {.features = group_, .rows = false}; }
  std::vector<ParamId> params() const override { return {weight_}; }
  bool takes_gaps(std::int64_t width) const override { return width == group_; }
  bool rebuildable() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, RmsNormArgs{grouped(in[0], group_), state.vectors[static_cast<std::size_t>(weight_)],
                                              grouped(out[0], group_), eps_});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    // The residual stream's gradient is float32; a head norm's keeps the dtype of q and k.
    const auto& x = builder.graph().tensor(node.inputs[0]);
    builder.contribute(node.inputs[0], x.dtype, {grad, node.inputs[0]}, [&](bool accumulate) {
      return std::make_shared<RmsNormBackwardOp>(weight_, group_, eps_, accumulate);
    });
  }

 private:
  ParamId weight_;
  std::int64_t group_;
  float eps_;
};

class RotaryOp final : public Operator {
 public:
  RotaryOp(std::int64_t num_heads, std::int64_t head_dim, bool inverse)
      : num_heads_(num_heads), head_dim_(head_dim), inverse_(inverse) {}
  Coupling coupling() const override { return {.features = head_dim_, .rows = false}; }
  std::string_view name() const override { return inverse_ ? "rotary_backward" : "rotary"; }
  int alias(int) const override { return 0; }
  bool in_place_only() const override { return false; }
  bool rebuildable() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, RotaryArgs{in[0].split_rows(num_heads_), out[0].split_rows(num_heads_),
                                             state.batch->positions, state.batch->cos, state.batch->sin, inverse_});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    builder.emit(std::make_shared<RotaryOp>(num_heads_, head_dim_, !inverse_), {grad}, {node.inputs[0]},
                 builder.graph().tensor(grad).dtype);
  }

 private:
  std::int64_t num_heads_, head_dim_;
  bool inverse_;
};

class AttentionBackwardOp final : public Operator {
 public:
  explicit AttentionBackwardOp(const AttentionShape& shape) : shape_(shape) {}
  std::string_view name() const override { return "attention_backward"; }
  double flops(const Graph&, double context) const override {
    return 10.0 * static_cast<double>(shape_.num_heads * shape_.head_dim) * context;
  }
  bool joins_outputs() const override { return true; }
  // in: grad y, q, y, lse; out: grad q, grad k, grad v of these rows. Adds to the sequences' accumulators.
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const auto h = shape_.num_heads, kv = shape_.num_kv_heads;
    flexcore::run(*state.context,
                  AttentionBackwardArgs{in[0].split_rows(h), in[1].split_rows(h), in[2].split_rows(h), in[3],
                                        state.batch->pages[static_cast<std::size_t>(node.layer)],
                                        state.batch->backward_spans, out[0].split_rows(h), out[1].split_rows(kv),
                                        out[2].split_rows(kv), shape_.scale, shape_.sliding_window});
  }

 private:
  AttentionShape shape_;
};

// Inputs: q, k, v; or q alone, where keys and values are in the pages already.
class AttentionOp final : public Operator {
 public:
  AttentionOp(const AttentionShape& shape, bool writes) : shape_(shape), writes_(writes) {}
  std::string_view name() const override { return "attention"; }
  Coupling coupling() const override { return {.features = shape_.head_dim, .rows = true}; }
  bool effect() const override { return writes_; }
  std::optional<Recompute> recompute(const std::vector<bool>&) const override {
    return Recompute{std::make_shared<AttentionOp>(shape_, false), {0}, {0, 1}};
  }
  double flops(const Graph&, double context) const override {
    return 4.0 * static_cast<double>(shape_.num_heads * shape_.head_dim) * context;
  }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const auto h = shape_.num_heads, kv = shape_.num_kv_heads;
    const auto& pages = state.batch->pages[static_cast<std::size_t>(node.layer)];
    if (writes_)
      flexcore::run(*state.context, KvWriteArgs{in[1].split_rows(kv), in[2].split_rows(kv), pages, state.batch->spans});
    flexcore::run(*state.context, AttentionArgs{in[0].split_rows(h), pages, state.batch->spans, out[0].split_rows(h),
                                                out[1], shape_.scale, shape_.sliding_window});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    const TensorId q = node.inputs[0];
    builder.emit(std::make_shared<AttentionBackwardOp>(shape_), {grad, q, node.outputs[0], node.outputs[1]},
                 {q, node.inputs[1], node.inputs[2]}, builder.graph().tensor(q).dtype);
  }

 private:
  AttentionShape shape_;
  bool writes_;
};

class SiluMulBackwardOp final : public Operator {
 public:
  std::string_view name() const override { return "silu_mul_backward"; }
  bool joins_outputs() const override { return true; }
  // in: grad y, gate, up; out: grad gate, grad up
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, SiluMulBackwardArgs{in[0], in[1], in[2], out[0], out[1]});
  }
};

class SiluMulOp final : public Operator {
 public:
  std::string_view name() const override { return "silu_mul"; }
  Coupling coupling() const override { return {.features = 1, .rows = false}; }
  bool rebuildable() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, SiluMulArgs{in[0], in[1], out[0]});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    builder.emit(std::make_shared<SiluMulBackwardOp>(), {grad, node.inputs[0], node.inputs[1]}, node.inputs,
                 builder.graph().tensor(node.inputs[0]).dtype);
  }
};

}  // namespace

std::shared_ptr<const Operator> embedding_op(ParamId weight) { return std::make_shared<EmbeddingOp>(weight); }
std::shared_ptr<const Operator> copy_op() { return std::make_shared<CopyOp>(); }
std::shared_ptr<const Operator> rms_norm_op(ParamId weight, std::int64_t group, float eps) {
  return std::make_shared<RmsNormOp>(weight, group, eps);
}
std::shared_ptr<const Operator> rotary_op(std::int64_t num_heads, std::int64_t head_dim, bool inverse) {
  return std::make_shared<RotaryOp>(num_heads, head_dim, inverse);
}
std::shared_ptr<const Operator> attention_op(const AttentionShape& shape) {
  return std::make_shared<AttentionOp>(shape, true);
}
std::shared_ptr<const Operator> silu_mul_op() { return std::make_shared<SiluMulOp>(); }

}  // namespace flexcore
