#pragma once

#include <span>

#include "flexcore/config.h"
#include "sched/sequence.h"

namespace flexcore {

/// How long a step may be for the sake of those who decode. Each has an allowance: with e ms since its first token and
/// n tokens, a step of T ms leaves its mean time per output token at (e + T) / n, which is to stay at or under tpot_ms.
/// What it has earned by shorter steps, tpot_ms * (n - 1) - e, may be spent; what it has lost is won back.
struct StepLimits {
  double prefill_ms;                   // may spend all that was earned; infinite when nobody decodes
  double finetune_ms;                  // leaves a reserve to prefill; infinite when nobody decodes
  const Sequence* tightest = nullptr;  // who sets finetune_ms
  double slack_ms = 0.0;               // that it has earned, or lost (below 0)
};

/// `least_ms` is the predicted time of a step that only decodes: a request that even such steps would not bring back to
/// its objective limits the others no more than any. Steps may take `margin` times their predicted time longer: what
/// they did is made good in the steps that follow, and the reserve is for the last ones.
StepLimits step_limits(std::span<Sequence* const> running, std::span<const SLO> objectives, double now_ms,
                       double least_ms, double margin);

}  // namespace flexcore
