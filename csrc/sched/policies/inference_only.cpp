#include "sched/policy.h"

namespace flexcore {
namespace {

/// Jobs wait for ever: what serving is like without finetuning.
class InferenceOnly final : public Policy {
 public:
  bool trains() const override { return false; }
  Allowance allowance(const Load&) override { return {.tokens = 0}; }
};

}  // namespace

std::unique_ptr<Policy> inference_only_policy() { return std::make_unique<InferenceOnly>(); }

}  // namespace flexcore
