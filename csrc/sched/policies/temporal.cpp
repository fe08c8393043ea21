#include "sched/policies/turns.h"

namespace flexcore {
namespace {

/// A turn of finetuning after every `frequency` inference steps (the temporal sharing that FlexLLM compares with, arXiv
/// 2402.18789, section 8).
class Temporal final : public Turns {
 public:
  explicit Temporal(std::int64_t frequency) : frequency_(static_cast<double>(frequency)) {}
  double interval(const Load&) override { return frequency_; }

 private:
  double frequency_;
};

}  // namespace

std::unique_ptr<Policy> temporal_policy(std::int64_t frequency) { return std::make_unique<Temporal>(frequency); }

}  // namespace flexcore
