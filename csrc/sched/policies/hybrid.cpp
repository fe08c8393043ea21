#include <algorithm>

#include "sched/policy.h"

namespace flexcore {
namespace {

/// Every step: inference first, then as much finetuning as the objectives leave time for (FlexLLM, arXiv 2402.18789,
/// section 6.2, with the objective of every request instead of one step time).
class Hybrid final : public Policy {
 public:
  Allowance allowance(const Load& load) override {
    // Who comes next may have less time than those who are there.
    return {.step_ms = load.inference ? std::min(load.limit_ms, load.idle_ms) : load.idle_ms, .floor = true};
  }
};

}  // namespace

std::unique_ptr<Policy> hybrid_policy() { return std::make_unique<Hybrid>(); }

}  // namespace flexcore
