#include <limits>

#include "sched/policy.h"

namespace flexcore {
namespace {

/// Requests wait until no job has work: what finetuning is like without serving.
class FinetuneOnly final : public Policy {
 public:
  bool serves(const Load& load) override { return !load.training; }
  Allowance allowance(const Load&) override { return {.step_ms = std::numeric_limits<double>::infinity()}; }
};

}  // namespace

std::unique_ptr<Policy> finetune_only_policy() { return std::make_unique<FinetuneOnly>(); }

}  // namespace flexcore
