#include "sched/slack.h"

#include <algorithm>
#include <limits>

namespace flexcore {
namespace {

constexpr double kLongestGap = 1.5;    // of tpot_ms: no step is longer, whatever was earned
constexpr double kReserve = 0.5;       // of tpot_ms: what finetuning leaves to each request, for pieces of prefill
constexpr double kReserveSteps = 8.0;  // what is above it is spent, and what is missing earned, over so many steps
constexpr double kRepaySteps = 2.0;    // what was lost is won back in so many steps, or in those that are left

}  // namespace

StepLimits step_limits(std::span<Sequence* const> running, std::span<const SLO> objectives, double now_ms,
                       double least_ms) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  StepLimits limits{.prefill_ms = kInfinite, .finetune_ms = kInfinite};
  for (const Sequence* sequence : running) {
    if (sequence->first_token_ms < 0.0 || sequence->num_generated() == 0) continue;
    const double tpot = objectives[static_cast<std::size_t>(sequence->slo_class)].tpot_ms;
    const double slack =
        tpot * static_cast<double>(sequence->num_generated() - 1) - (now_ms - sequence->first_token_ms);
    const double left = static_cast<double>(
        std::max<std::int64_t>(1, sequence->max_total_tokens - static_cast<std::int64_t>(sequence->tokens.size())));
    double prefill = tpot, finetune = tpot;
    if (slack + left * (tpot - least_ms) >= 0.0) {
      const double repaid = std::min(slack, 0.0) / std::min(left, kRepaySteps);
      prefill += repaid + std::max(slack, 0.0);
      finetune += repaid + (std::max(slack, 0.0) - kReserve * tpot) / kReserveSteps;
    }
    limits.prefill_ms = std::min({limits.prefill_ms, prefill, kLongestGap * tpot});
    finetune = std::min(finetune, kLongestGap * tpot);
    if (finetune < limits.finetune_ms) {
      limits.finetune_ms = finetune;
      limits.tightest = sequence;
      limits.slack_ms = slack;
    }
  }
  return limits;
}

}  // namespace flexcore
