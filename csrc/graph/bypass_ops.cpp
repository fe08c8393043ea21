#include "graph/bypass_ops.h"

#include <algorithm>

#include "graph/backward_builder.h"
#include "graph/graph.h"
#include "graph/layer_ops.h"
#include "ops/linear.h"
#include "ops/scatter.h"

namespace flexcore {

namespace {

constexpr double kUsualRank = 16;  // a program serves adapters of every rank

struct Segments {
  const std::vector<LoraSegment>& lora;
  const std::vector<SegmentDropout>* dropout;  // null: none of these has any
};
Segments segments_of(const BatchState& batch, SiteId site, BypassKind kind) {
  const SiteSegments& all = batch.sites[static_cast<std::size_t>(site)];
  switch (kind) {
    case BypassKind::kDora:
      return {all.product_lora, all.product_dropout.empty() ? nullptr : &all.product_dropout};
    case BypassKind::kSeries:
      return {all.series, nullptr};
    default:
      return {all.lora, all.dropout.empty() ? nullptr : &all.dropout};
  }
}
const std::vector<ScaleSegment>& scales_of(const BatchState& batch, SiteId site, BypassKind kind) {
  const SiteSegments& all = batch.sites[static_cast<std::size_t>(site)];
  return kind == BypassKind::kInputScale ? all.input_scale : all.output_scale;
}

/// visit(begin, end, dropout) for rows of the batch, some at a time: a copy of x without what is dropped takes no more.
template <class Visit>
void for_dropout_rows(std::int64_t first, std::int64_t last, const SegmentDropout& whole, Visit&& visit) {
  constexpr std::int64_t kRows = 256;
  for (std::int64_t begin = first; begin < last; begin += kRows) {
    SegmentDropout dropout = whole;
    dropout.position += begin - first;
    visit(begin, std::min(begin + kRows, last), dropout);
  }
}

bool drops(const Segments& segments, std::size_t i) {
  return segments.dropout != nullptr && (*segments.dropout)[i].mask.p > 0.0;
}
/// The segments without dropout, in `storage` where there are others.
std::span<const LoraSegment> plain_of(const Segments& segments, std::vector<LoraSegment>& storage) {
  if (segments.dropout == nullptr) return segments.lora;
  for (std::size_t i = 0; i < segments.lora.size(); ++i)
    if (!drops(segments, i)) storage.push_back(segments.lora[i]);
  return storage;
}

/// visit(rows of the batch, the segment of these rows alone, its dropout) for a site's segments that have some.
template <class Visit>
void for_dropout_rows(const Segments& segments, Visit&& visit) {
  for (std::size_t i = 0; i < segments.lora.size(); ++i)
    if (drops(segments, i))
      for_dropout_rows(segments.lora[i].begin, segments.lora[i].end, (*segments.dropout)[i],
                       [&](std::int64_t begin, std::int64_t end, const SegmentDropout& dropout) {
                         LoraSegment segment = segments.lora[i];
                         segment.begin = 0, segment.end = end - begin;
                         visit(begin, end, segment, dropout);
                       });
}

void add_lora(OpContext& context, const TensorView& x, const TensorView& y, const Segments& segments) {
  for_dropout_rows(segments,
                   [&](std::int64_t begin, std::int64_t end, const LoraSegment& segment, const auto& dropout) {
                     const Arena::Scope scope(*context.scratch);
                     const LoraArgs::Member member{y.rows(begin, end), {&segment, 1}};
                     flexcore::run(context, LoraArgs{dropped(context, x.rows(begin, end), dropout), {&member, 1}});
                   });
}

void add_gradients(OpContext& context, const TensorView& x, const TensorView& grad_y, const TensorView& grad_x,
                   const Segments& segments) {
  for_dropout_rows(segments,
                   [&](std::int64_t begin, std::int64_t end, const LoraSegment& segment, const auto& dropout) {
                     const Arena::Scope scope(*context.scratch);
                     const TensorView rows = dropped(context, x.rows(begin, end), dropout);
                     TensorView grad_rows;
                     if (grad_x) {
                       grad_rows = context.scratch->tensor(DType::kFloat32, {end - begin, x.shape(1)});
                       flexcore::run(context, ZeroArgs{grad_rows});
                     }
                     const LoraBackwardArgs::Member member{grad_y.rows(begin, end), {&segment, 1}};
                     flexcore::run(context, LoraBackwardArgs{rows, {&member, 1}, grad_rows});
                     if (grad_x)
                       flexcore::run(context, DropoutArgs{grad_rows, grad_x.rows(begin, end), dropout.mask,
                                                          dropout.position, GradMode::kAccumulate});
                   });
}

// Inputs: x, gradients of every site's y [, gradient of x to add to]. Outputs: that gradient, or none. Adds to grad_a,
// grad_b of the segments.
class LoraBackwardOp final : public Operator {
 public:
  LoraBackwardOp(std::vector<SiteId> sites, BypassKind kind, bool input_grad)
      : sites_(std::move(sites)), kind_(kind), input_grad_(input_grad) {}
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
    const TensorView grad_x = input_grad_ ? out[0] : TensorView{};
    std::vector<LoraBackwardArgs::Member> members;
    std::vector<std::vector<LoraSegment>> plain(sites_.size());
    for (std::size_t i = 0; i < sites_.size(); ++i) {
      const Segments segments = segments_of(*state.batch, sites_[i], kind_);
      add_gradients(*state.context, in[0], in[i + 1], grad_x, segments);
      if (const auto rest = plain_of(segments, plain[i]); !rest.empty()) members.push_back({in[i + 1], rest});
    }
    if (!members.empty()) flexcore::run(*state.context, LoraBackwardArgs{in[0], members, grad_x});
  }

 private:
  std::vector<SiteId> sites_;
  BypassKind kind_;
  bool input_grad_;
};

// in: grad y, x; out: grad x, or none. Adds to the segments' grad_scale.
class ScaleBackwardOp final : public Operator {
 public:
  ScaleBackwardOp(SiteId site, BypassKind kind, bool input_grad) : site_(site), kind_(kind), input_grad_(input_grad) {}
  std::string_view name() const override { return "scale_backward"; }
  bool effect() const override { return true; }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, ScaleBackwardArgs{in[0], in[1], scales_of(*state.batch, site_, kind_),
                                                    input_grad_ ? out[0] : TensorView{}});
  }

 private:
  SiteId site_;
  BypassKind kind_;
  bool input_grad_;
};

class ScaleOp final : public Operator {
 public:
  ScaleOp(SiteId site, BypassKind kind) : site_(site), kind_(kind) {}
  std::string_view name() const override { return "scale"; }
  int alias(int) const override { return 0; }
  bool rebuildable() const override { return true; }
  bool trainable() const override { return true; }
  bool idle(const BatchState& batch) const override { return scales_of(batch, site_, kind_).empty(); }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    flexcore::run(*state.context, ScaleArgs{in[0], out[0], scales_of(*state.batch, site_, kind_)});
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]), x = node.inputs[0];
    if (grad == kNoTensor) return;
    const bool needed = builder.needs(x);
    const auto op = std::make_shared<ScaleBackwardOp>(site_, kind_, needed);
    if (needed)
      builder.emit(op, {grad, x}, {x}, builder.graph().tensor(grad).dtype);
    else
      builder.emit_effect(op, {grad, x});
  }

 private:
  SiteId site_;
  BypassKind kind_;
};

const std::vector<DroppedSegment>& dropped_of(const BatchState& batch, SiteId site) {
  return batch.sites[static_cast<std::size_t>(site)].dropped;
}
// What dropout changes is (mask / (1 - p) - 1) x.
DropoutArgs change(const TensorView& x, const TensorView& y, const SegmentDropout& dropout, bool undo, GradMode mode) {
  return {x, y, dropout.mask, dropout.position, mode, undo ? -1.0f : 1.0f, undo ? 1.0f : -1.0f};
}
double dropped_flops(const Graph& graph, SiteId site) {
  const LinearSite& linear = graph.sites[static_cast<std::size_t>(site)];
  return 2.0 * static_cast<double>(linear.in_features) * static_cast<double>(linear.out_features);
}

// in: grad y, grad x; out: grad x, added to.
class DroppedLinearBackwardOp final : public Operator {
 public:
  DroppedLinearBackwardOp(SiteId site, ParamId weight, bool undo) : site_(site), weight_(weight), undo_(undo) {}
  std::string_view name() const override { return "dropped_linear_backward"; }
  int alias(int) const override { return 1; }
  bool idle(const BatchState& batch) const override { return dropped_of(batch, site_).empty(); }
  double flops(const Graph& graph, double) const override { return dropped_flops(graph, site_); }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    OpContext& context = *state.context;
    const WeightView& weight = state.matrices[static_cast<std::size_t>(weight_)];
    for (const auto& segment : dropped_of(*state.batch, site_))
      for_dropout_rows(
          segment.begin, segment.end, segment.dropout,
          [&](std::int64_t begin, std::int64_t end, const SegmentDropout& dropout) {
            const Arena::Scope scope(*context.scratch);
            const TensorView grad = context.scratch->tensor(DType::kFloat32, {end - begin, out[0].shape(1)});
            const LinearBackwardArgs::Member member{weight, in[0].rows(begin, end)};
            flexcore::run(context, LinearBackwardArgs{{&member, 1}, grad});
            flexcore::run(context, change(grad, out[0].rows(begin, end), dropout, undo_, GradMode::kAccumulate));
          });
  }

 private:
  SiteId site_;
  ParamId weight_;
  bool undo_;
};

class DroppedLinearOp final : public Operator {
 public:
  DroppedLinearOp(SiteId site, ParamId weight, bool undo) : site_(site), weight_(weight), undo_(undo) {}
  std::string_view name() const override { return "dropped_linear"; }
  int alias(int) const override { return 1; }
  bool idle(const BatchState& batch) const override { return dropped_of(batch, site_).empty(); }
  double flops(const Graph& graph, double) const override { return dropped_flops(graph, site_); }
  std::vector<ParamId> params() const override { return {weight_}; }
  std::optional<Recompute> recompute(const std::vector<bool>&) const override {
    return Recompute{std::make_shared<DroppedLinearOp>(*this), {0, 1}, {0}};
  }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    OpContext& context = *state.context;
    for (const auto& segment : dropped_of(*state.batch, site_))
      for_dropout_rows(segment.begin, segment.end, segment.dropout,
                       [&](std::int64_t begin, std::int64_t end, const SegmentDropout& dropout) {
                         const Arena::Scope scope(*context.scratch);
                         const TensorView x = context.scratch->tensor(in[0].dtype(), {end - begin, in[0].shape(1)});
                         flexcore::run(context, change(in[0].rows(begin, end), x, dropout, undo_, GradMode::kWrite));
                         const LinearArgs::Member member{.weight = state.matrices[static_cast<std::size_t>(weight_)],
                                                         .y = out[0].rows(begin, end),
                                                         .mode = GradMode::kAccumulate};
                         flexcore::run(context, LinearArgs{x, {&member, 1}});
                       });
  }
  void vjp(BackwardBuilder& builder, const Node& node) const override {
    const TensorId grad = builder.grad(node.outputs[0]), x = node.inputs[0];
    if (grad == kNoTensor) return;
    builder.pass(node.inputs[1], grad);
    if (!builder.needs(x)) return;
    // It only adds to grad x; the base linear writes it first.
    builder.contribute_after(x, [&builder, x, grad, op = *this] {
      builder.contribute(x, DType::kFloat32, {grad}, [&](bool) {
        return std::make_shared<DroppedLinearBackwardOp>(op.site_, op.weight_, op.undo_);
      });
    });
  }

 private:
  SiteId site_;
  ParamId weight_;
  bool undo_;
};

}  // namespace

std::shared_ptr<const Operator> dropped_linear_op(SiteId site, ParamId weight, bool undo) {
  return std::make_shared<DroppedLinearOp>(site, weight, undo);
}

TensorView dropped(OpContext& context, const TensorView& x, const SegmentDropout& dropout) {
  const TensorView copy = context.scratch->tensor(x.dtype(), {x.shape(0), x.shape(1)});
  flexcore::run(context, DropoutArgs{x, copy, dropout.mask, dropout.position});
  return copy;
}

std::shared_ptr<const Operator> scale_op(SiteId site, BypassKind kind) { return std::make_shared<ScaleOp>(site, kind); }

bool LoraOp::idle(const BatchState& batch) const {
  return std::all_of(sites_.begin(), sites_.end(),
                     [&](SiteId site) { return segments_of(batch, site, kind_).lora.empty(); });
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
  result.op = std::make_shared<LoraOp>(std::move(sites), kind_);
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
  std::vector<std::vector<LoraSegment>> plain(sites_.size());
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    const Segments segments = segments_of(*state.batch, sites_[i], kind_);
    add_lora(*state.context, in[0], out[i], segments);
    if (const auto rest = plain_of(segments, plain[i]); !rest.empty()) members.push_back({out[i], rest});
  }
  if (!members.empty()) flexcore::run(*state.context, LoraArgs{in[0], members});
}

void LoraOp::vjp(BackwardBuilder& builder, const Node& node) const {
  const TensorId x = node.inputs[0];
  if (kind_ == BypassKind::kSeries) {
    const TensorId grad = builder.grad(node.outputs[0]);
    if (grad == kNoTensor) return;
    if (!builder.needs(x))
      return builder.emit_effect(std::make_shared<LoraBackwardOp>(sites_, kind_, false), {x, grad});
    // x is y, whose gradient is read while that of x is added to.
    builder.emit(copy_op(), {grad}, {x}, DType::kFloat32);
    builder.contribute(x, DType::kFloat32, {x, grad},
                       [&](bool) { return std::make_shared<LoraBackwardOp>(sites_, kind_, true); });
    return;
  }
  std::vector<SiteId> sites;
  std::vector<TensorId> inputs = {x};
  for (std::size_t i = 0; i < sites_.size(); ++i) {
    const TensorId grad = builder.grad(node.outputs[i]);
    if (grad == kNoTensor) continue;
    sites.push_back(sites_[i]);
    inputs.push_back(grad);
    builder.pass(node.inputs[1 + i], grad);
  }
  if (sites.empty()) return;
  if (!builder.needs(x)) {
    builder.emit_effect(std::make_shared<LoraBackwardOp>(sites, kind_, false), inputs);
    return;
  }
  // The kernel only adds to grad x; the base linear writes it first.
  builder.contribute_after(x, [&builder, x, sites, inputs, kind = kind_] {
    builder.contribute(x, DType::kFloat32, inputs,
                       [&](bool) { return std::make_shared<LoraBackwardOp>(sites, kind, true); });
  });
}

}  // namespace flexcore
