#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "graph/operator.h"

namespace flexcore {

/// Inputs: x [, residual]. Outputs: y of every member; with a residual, the one y takes over its memory (y = residual +
/// x W^T).
class LinearOp final : public Operator {
 public:
  struct Member {
    ParamId weight = kNoParam;
    ParamId bias = kNoParam;
  };
  LinearOp(std::vector<Member> members, bool residual) : members_(std::move(members)), residual_(residual) {}

  std::string_view name() const override { return "linear"; }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override;
  void vjp(BackwardBuilder& builder, const Node& node) const override;
  int alias(int) const override { return residual_ ? 1 : -1; }
  bool joins_outputs() const override { return true; }
  std::optional<Recompute> recompute(const std::vector<bool>& wanted) const override;
  double flops(const Graph& graph, double context) const override;
  std::vector<ParamId> params() const override;

  const std::vector<Member>& members() const { return members_; }
  bool residual() const { return residual_; }

 private:
  std::vector<Member> members_;
  bool residual_;
};

/// The bypass network of LoRA at one or several linears with the same input. Inputs: x, y of every site. Outputs: the
/// same y, in place: y += scaling * (x A^T) B^T. Does nothing for rows whose adapter has no LoRA there.
class LoraOp final : public Operator {
 public:
  explicit LoraOp(std::vector<SiteId> sites) : sites_(std::move(sites)) {}

  std::string_view name() const override { return "lora"; }
  void run(const RunState& state, const Node& node, std::span<const TensorView> in,
           std::span<const TensorView> out) const override;
  void vjp(BackwardBuilder& builder, const Node& node) const override;
  int alias(int output) const override { return 1 + output; }
  bool trainable() const override { return true; }
  std::optional<Recompute> recompute(const std::vector<bool>& wanted) const override;
  double flops(const Graph& graph, double context) const override;

  const std::vector<SiteId>& sites() const { return sites_; }

 private:
  std::vector<SiteId> sites_;
};

}  // namespace flexcore
