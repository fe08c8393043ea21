#pragma once

#include <memory>
#include <vector>

#include "graph/operator.h"

namespace flexcore {

/// The bypass network of LoRA or of a bottleneck adapter at one or several linears with the same input. Inputs: x, y of
/// every site. Outputs: the same y, in place: y += scaling * act(x A^T) B^T. Does nothing for rows whose adapter has
/// none there. `kind` says whose segments: kLora, kDora (those of the product) or kSeries, where x is y.
class LoraOp final : public Operator {
 public:
  LoraOp(std::vector<SiteId> sites, BypassKind kind) : sites_(std::move(sites)), kind_(kind) {}

  std::string_view name() const override { return "lora"; }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override;
  void vjp(BackwardBuilder& builder, const Node& node) const override;
  int alias(int output) const override { return 1 + output; }
  bool trainable() const override { return true; }
  bool idle(const BatchState& batch) const override;
  std::optional<Recompute> recompute(const std::vector<bool>& wanted) const override;
  double flops(const Graph& graph, double context) const override;

  const std::vector<SiteId>& sites() const { return sites_; }
  BypassKind kind() const { return kind_; }

 private:
  std::vector<SiteId> sites_;
  BypassKind kind_;
};

/// in: x, y; out: y + (x without what is dropped - x) W^T, in place, for the segments' rows; `undo`: y less that.
std::shared_ptr<const Operator> dropped_linear_op(SiteId site, ParamId weight, bool undo);

/// A copy of x on the scratch, without what is dropped.
TensorView dropped(OpContext& context, const TensorView& x, const SegmentDropout& dropout);

/// in: x; out: x with the columns of the segments' rows scaled, in place. kOutputScale or kInputScale.
std::shared_ptr<const Operator> scale_op(SiteId site, BypassKind kind);

}  // namespace flexcore
