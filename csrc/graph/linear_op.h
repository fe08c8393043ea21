#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "graph/operator.h"

namespace flexcore {

/// Whether a bypass changes what a linear with a residual makes before the two are added. Serving programs have both
/// ways, and a batch takes one.
enum class When : std::uint8_t { kAlways, kFused, kSeparated };

/// Inputs: x [, residual]. Outputs: y of every member; with a residual, the one y takes over its memory (y = residual +
/// x W^T).
class LinearOp final : public Operator {
 public:
  struct Member {
    ParamId weight = kNoParam;
    ParamId bias = kNoParam;
  };
  LinearOp(std::vector<Member> members, bool residual, When when = When::kAlways, SiteId site = 0)
      : members_(std::move(members)), residual_(residual), when_(when), site_(site) {}

  std::string_view name() const override { return "linear"; }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override;
  void vjp(BackwardBuilder& builder, const Node& node) const override;
  int alias(int) const override { return residual_ ? 1 : -1; }
  bool joins_outputs() const override { return true; }
  bool idle(const BatchState& batch) const override;
  std::optional<Recompute> recompute(const std::vector<bool>& wanted) const override;
  double flops(const Graph& graph, double context) const override;
  std::vector<ParamId> params() const override;

  const std::vector<Member>& members() const { return members_; }
  bool residual() const { return residual_; }
  /// Alone, and whatever the batch.
  bool plain() const { return !residual_ && when_ == When::kAlways; }

 private:
  std::vector<Member> members_;
  bool residual_;
  When when_;
  SiteId site_;
};

/// in: y, product; out: y + product, in place.
std::shared_ptr<const Operator> add_op(When when, SiteId site);

}  // namespace flexcore
