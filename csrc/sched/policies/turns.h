#pragma once

#include <limits>

#include "sched/policy.h"

namespace flexcore {

/// Inference steps, then a turn of finetuning alone: forward and backward of at least one sequence. With nobody to
/// serve, turns follow each other.
class Turns : public Policy {
 public:
  /// Inference steps between two turns.
  virtual double interval(const Load& load) = 0;

  bool serves(const Load& load) final {
    in_turn_ = load.training && (in_turn_ || static_cast<double>(steps_) >= interval(load));
    return !in_turn_;
  }
  Allowance allowance(const Load& load) final {
    in_turn_ = in_turn_ || (load.training && !load.inference);
    return {.step_ms = in_turn_ ? std::numeric_limits<double>::infinity() : 0.0};
  }
  void stepped(const StepPlan& plan, std::int64_t sequences_done) final {
    if (sequences_done > 0) {
      in_turn_ = false;
      steps_ = 0;
    }
    steps_ += !plan.inference.empty();
  }

 private:
  std::int64_t steps_ = 0;  // that served, since the last turn
  bool in_turn_ = false;
};

}  // namespace flexcore
