#pragma once

#include <vector>

#include "compile/parallel_bypass.h"
#include "parallel/ranks.h"

namespace flexcore::test {

/// c = a b on every rank from what it has, in the state that the plan says. Throws when the shapes are not those of it.
Sharded local_product(const Ranks& ranks, const Sharded& a, const Sharded& b, ParallelState state);
Sharded transpose(const Sharded& x);
/// Adds, in one state.
void add_to(Sharded& sum, const Sharded& x);

/// Executes a bypass as its plan says: every transition is one of Ranks, every step is local.
class BypassRun {
 public:
  /// Weights are whole matrices, of a step without one empty.
  BypassRun(Ranks& ranks, BypassForm form, BypassPlan plan, BypassSizes sizes, const std::vector<Block>& weights);

  const BypassPlan& plan() const { return plan_; }
  Sharded forward(const Sharded& x);        // x in plan.read; the result is in plan.join
  Sharded backward(const Sharded& grad_y);  // in plan.grad_read; the result is in plan.grad_join
  /// Whole gradients of the weights, after the optimizer step's transitions.
  const std::vector<Block>& gradients() const { return gradients_; }
  /// What the plan says that `rank` sends in a forward, a backward and an optimizer step.
  std::int64_t planned_bytes(int rank, std::int64_t num_tokens) const;

 private:
  Sharded step_forward(std::size_t i, const Sharded& x) const;
  Sharded elementwise(const Sharded& a, const Sharded& b, ParallelState state) const;

  Ranks& ranks_;
  BypassForm form_;
  BypassPlan plan_;
  BypassSizes sizes_;
  std::vector<Sharded> weights_, saved_;
  std::vector<Block> gradients_;
};

}  // namespace flexcore::test
