#include "sched/slack.h"

#include <algorithm>
#include <limits>

namespace flexcore {
namespace {

constexpr double kLongestGap = 1.5;    // of tpot_ms: no step is longer, whatever was earned
constexpr double kErrorReserve = 0.5;  // of margin * tpot_ms: errors of single steps even out over a request
constexpr double kReserve = 0.5;       // of tpot_ms: what finetuning leaves to each request besides, for prefill
constexpr double kReserveSteps = 8.0;  // what is above a reserve is spent, and what is missing earned, in so many steps
constexpr double kRepaySteps = 2.0;    // what was lost is won back in so many steps, or in those that are left

}  // namespace

StepLimits step_limits(std::span<Sequence* const> running, std::span<const SLO> objectives, double now_ms,
                       double least_ms, double margin) {
  constexpr double kInfinite = std::numeric_limits<double>::infinity();
  StepLimits limits{.prefill_ms = kInfinite, .finetune_ms = kInfinite};
  for (const Sequence* sequence : running) {
    if (sequence->first_token_ms < 0.0 || sequence->num_generated() == 0) continue;
    const double tpot = objectives[static_cast<std::size_t>(sequence->slo_class)].tpot_ms;
    const double slack =
        tpot * static_cast<double>(sequence->num_generated() - 1) - (now_ms - sequence->first_token_ms);
    const double left = static_cast<double>(
        std::max<std::int64_t>(1, sequence->max_total_tokens - static_cast<std::int64_t>(sequence->tokens.size())));
    double prefill = std::max(tpot, 2.0 * least_ms), finetune = tpot;  // of one that cannot be kept any more
    if (slack + left * (tpot - least_ms) >= 0.0) {
      const double repaid = std::min(slack, 0.0) / std::min(left, kRepaySteps);
      const double earned = std::max(slack, 0.0), for_errors = kErrorReserve * margin * tpot;
      const double longest = kLongestGap * tpot / (1.0 + kErrorReserve * margin);
      prefill = tpot + repaid + (earned - for_errors) / (earned > for_errors ? 1.0 : kReserveSteps);
      finetune = tpot + repaid + (earned - for_errors - kReserve * tpot) / kReserveSteps;
      prefill = std::min(prefill, longest);
      finetune = std::min(finetune, longest);
    }
    limits.prefill_ms = std::min(limits.prefill_ms, prefill);
    if (finetune < limits.finetune_ms) {
      limits.finetune_ms = finetune;
      limits.tightest = sequence;
      limits.slack_ms = slack;
    }
  }
  return limits;
}

}  // namespace flexcore
