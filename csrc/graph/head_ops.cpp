#include <algorithm>

#include "graph/backward_builder.h"
#include "graph/bypass_ops.h"
#include "graph/layer_ops.h"
#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "ops/product.h"
#include "ops/rows.h"
#include "ops/scatter.h"

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

/// Rows of the output layer that an adapter changes, with one segment of it.
struct AdaptedRows {
  std::int64_t begin, end;  // target rows
  const LoraSegment* lora = nullptr;
  const SegmentDropout* dropout = nullptr;  // of the LoRA
  const OwnWeightSegment* own = nullptr;
};

std::vector<AdaptedRows> adapted_rows(const SiteSegments& segments) {
  std::vector<AdaptedRows> rows;
  for (std::size_t i = 0; i < segments.lora.size(); ++i)
    rows.push_back({segments.lora[i].begin, segments.lora[i].end, &segments.lora[i],
                    segments.dropout.empty() ? nullptr : &segments.dropout[i]});
  for (const auto& own : segments.own) rows.push_back({own.begin, own.end, nullptr, nullptr, &own});
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  return rows;
}

// Loss, and gradient of the hidden states unless the loss alone is wanted. Rows without an adapter at the output layer
// go through one fused op. The logits of others are made, some rows at a time, as the adapter changes them.
class CrossEntropyOp final : public Operator {
 public:
  CrossEntropyOp(ParamId weight, SiteId site) : weight_(weight), site_(site) {}
  std::string_view name() const override { return "linear_cross_entropy"; }
  std::vector<ParamId> params() const override { return {weight_}; }
  bool effect() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    const SiteSegments& segments = state.batch->sites[static_cast<std::size_t>(site_)];
    const std::int64_t total = in[0].shape(0);
    if (segments.empty()) return plain(state, in[0], out[0], 0, total);
    const WeightView& weight = state.matrices[static_cast<std::size_t>(weight_)];
    const std::int64_t step = logit_rows(state.context->device.kind, weight.out_features);
    std::int64_t row = 0;
    for (const AdaptedRows& part : adapted_rows(segments)) {
      plain(state, in[0], out[0], row, part.begin);
      for (row = part.begin; row < part.end; row += std::min(step, part.end - row))
        adapted(state, weight, in[0], out[0], part, row, std::min(row + step, part.end));
    }
    plain(state, in[0], out[0], row, total);
  }
  // The forward made the gradient already.
  void vjp(BackwardBuilder& builder, const Node& node) const override { builder.pass(node.inputs[0], node.outputs[0]); }

 private:
  static TensorView scale_of(const BatchState& batch, std::int64_t begin, std::int64_t end) {
    return batch.grad_scale.data() == nullptr ? TensorView{} : batch.grad_scale.rows(begin, end);
  }

  void plain(const RunState& state, const TensorView& hidden, const TensorView& grad, std::int64_t begin,
             std::int64_t end) const {
    if (begin == end) return;
    const auto& batch = *state.batch;
    const bool loss_only = batch.grad_scale.data() == nullptr;
    flexcore::run(*state.context, LinearCrossEntropyArgs{
                                      hidden.rows(begin, end), state.matrices[static_cast<std::size_t>(weight_)],
                                      batch.labels.rows(begin, end), batch.loss.rows(begin, end),
                                      scale_of(batch, begin, end), loss_only ? TensorView{} : grad.rows(begin, end)});
  }

  static void adapted(const RunState& state, const WeightView& base, const TensorView& hidden, const TensorView& grad,
                      const AdaptedRows& part, std::int64_t begin, std::int64_t end) {
    OpContext& context = *state.context;
    const BatchState& batch = *state.batch;
    const Arena::Scope scope(*context.scratch);
    const TensorView x = hidden.rows(begin, end);
    const WeightView& weight = part.own != nullptr ? part.own->weight : base;
    const TensorView logits = context.scratch->tensor(DType::kFloat32, {end - begin, weight.out_features});
    const LinearArgs::Member product{weight, {}, logits};
    flexcore::run(context, LinearArgs{x, {&product, 1}});
    TensorView lora_x = x;
    SegmentDropout dropout;
    LoraSegment lora;
    if (part.lora != nullptr) {
      lora = *part.lora;
      lora.begin = 0, lora.end = end - begin;
      if (part.dropout != nullptr && part.dropout->mask.p > 0.0) {
        dropout = *part.dropout;
        dropout.position += begin - part.begin;
        lora_x = dropped(context, x, dropout);
      }
      const LoraArgs::Member member{logits, {&lora, 1}};
      flexcore::run(context, LoraArgs{lora_x, {&member, 1}});
    }
    flexcore::run(context, CrossEntropyArgs{logits, batch.labels.rows(begin, end), batch.loss.rows(begin, end),
                                            scale_of(batch, begin, end)});
    if (batch.grad_scale.data() == nullptr) return;
    const TensorView grad_x = grad.rows(begin, end);
    const LinearBackwardArgs::Member back{weight, logits};
    flexcore::run(context, LinearBackwardArgs{{&back, 1}, grad_x});
    if (part.lora != nullptr) lora_gradients(context, lora_x, logits, grad_x, lora, dropout);
    if (part.own != nullptr && part.own->grad_weight != nullptr) own_gradient(context, x, logits, *part.own);
  }

  // By chunks of the vocabulary: what a chunk takes of the scratch is a few MiB, whatever the vocabulary.
  static void lora_gradients(OpContext& context, const TensorView& x, const TensorView& grad_logits,
                             const TensorView& grad_x, const LoraSegment& whole, const SegmentDropout& dropout) {
    const std::int64_t vocab_size = grad_logits.shape(1);
    TensorView grad = grad_x;
    if (dropout.mask.p > 0.0) {
      grad = context.scratch->tensor(DType::kFloat32, {x.shape(0), x.shape(1)});
      flexcore::run(context, ZeroArgs{grad});
    }
    for (std::int64_t begin = 0; begin < vocab_size; begin += kVocabularyChunk) {
      const std::int64_t end = std::min(begin + kVocabularyChunk, vocab_size);
      LoraSegment segment = whole;
      segment.lora_b += begin * whole.rank;
      if (segment.grad_b != nullptr) segment.grad_b += begin * whole.rank;
      TensorView columns(grad_logits.as<float>() + begin, DType::kFloat32, {grad_logits.shape(0), end - begin});
      columns.set_stride(0, grad_logits.stride(0));
      const LoraBackwardArgs::Member member{columns, {&segment, 1}};
      flexcore::run(context, LoraBackwardArgs{x, {&member, 1}, grad});
    }
    if (dropout.mask.p > 0.0)
      flexcore::run(context, DropoutArgs{grad, grad_x, dropout.mask, dropout.position, GradMode::kAccumulate});
  }

  static void own_gradient(OpContext& context, const TensorView& x, const TensorView& grad_logits,
                           const OwnWeightSegment& own) {
    TensorView floats = x;
    if (x.dtype() != DType::kFloat32) {
      floats = context.scratch->tensor(DType::kFloat32, {x.shape(0), x.shape(1)});
      flexcore::run(context, CopyArgs{x, floats});
    }
    flexcore::run(context,
                  ProductArgs{.a = grad_logits,
                              .b = floats,
                              .c = TensorView(own.grad_weight, DType::kFloat32, {grad_logits.shape(1), x.shape(1)}),
                              .transpose_a = true,
                              .mode = GradMode::kAccumulate});
  }

  ParamId weight_;
  SiteId site_;
};

}  // namespace

std::shared_ptr<const Operator> gather_op(RowSet rows) { return std::make_shared<GatherOp>(rows); }
std::shared_ptr<const Operator> cross_entropy_op(ParamId weight, SiteId site) {
  return std::make_shared<CrossEntropyOp>(weight, site);
}

}  // namespace flexcore
