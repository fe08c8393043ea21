#include "sched/slack.h"

#include <gtest/gtest.h>

#include <limits>

namespace flexcore {
namespace {

constexpr double kInfinite = std::numeric_limits<double>::infinity();
const SLO kSlo{.tpot_ms = 100.0};

Sequence decoding(std::int64_t generated, double first_token_ms, std::int64_t left = 50) {
  Sequence sequence;
  sequence.num_prompt_tokens = 4;
  sequence.tokens.resize(static_cast<std::size_t>(4 + generated));
  sequence.max_total_tokens = 4 + generated + left;
  sequence.first_token_ms = first_token_ms;
  return sequence;
}

StepLimits limits(std::vector<Sequence> sequences, double now_ms, double least_ms = 20.0, double margin = 0.0) {
  std::vector<Sequence*> running;
  for (auto& sequence : sequences) running.push_back(&sequence);
  StepLimits result = step_limits(running, std::vector{kSlo}, now_ms, least_ms, margin);
  result.tightest = nullptr;  // of the caller's copy
  return result;
}

TEST(StepLimits, NobodyDecodes) {
  Sequence prefill;
  prefill.tokens.resize(9);
  prefill.num_prompt_tokens = 9;
  EXPECT_EQ(limits({}, 5.0).finetune_ms, kInfinite);
  EXPECT_EQ(limits({prefill}, 5.0).prefill_ms, kInfinite);
}

TEST(StepLimits, JustBegunMayTakeTheObjective) {
  EXPECT_DOUBLE_EQ(limits({decoding(1, 300.0)}, 300.0).prefill_ms, 100.0);
  EXPECT_DOUBLE_EQ(limits({decoding(1, 300.0)}, 300.0).finetune_ms, 93.75);  // an eighth of the reserve is put by
  EXPECT_DOUBLE_EQ(limits({decoding(1, 300.0)}, 310.0).prefill_ms, 95.0);    // 10 ms late: half is won back
}

TEST(StepLimits, PrefillMaySpendWhatWasEarnedAndFinetuningALittle) {
  const StepLimits earned = limits({decoding(3, 0.0)}, 170.0);  // 30 ms in hand
  EXPECT_DOUBLE_EQ(earned.slack_ms, 30.0);
  EXPECT_DOUBLE_EQ(earned.prefill_ms, 130.0);
  EXPECT_DOUBLE_EQ(earned.finetune_ms, 97.5);  // 20 are missing in the reserve
  const StepLimits rich = limits({decoding(11, 0.0)}, 300.0);
  EXPECT_DOUBLE_EQ(rich.prefill_ms, 150.0);  // no gap is longer
  EXPECT_DOUBLE_EQ(rich.finetune_ms, 150.0);
  EXPECT_DOUBLE_EQ(limits({decoding(4, 0.0)}, 170.0).finetune_ms, 110.0);
}

// Whatever steps it is given, as long as they keep the limit, a request that is not lost ends within its objective.
TEST(StepLimits, WhoFollowsThemKeepsTheObjective) {
  for (const double late : {0.0, 150.0, 900.0}) {
    double now = late;  // since its first token
    for (std::int64_t generated = 1; generated < 40; ++generated) {
      const StepLimits limit = limits({decoding(generated, 0.0, 40 - generated)}, now);
      now += std::max(20.0, limit.finetune_ms);
    }
    EXPECT_LE(now, 100.0 * 39.0 + 1e-9) << late;
  }
}

// Half an objective is left at the end, so that a piece of prefill in the last steps costs nobody the objective.
TEST(StepLimits, AReserveGrowsFromNothing) {
  double now = 0.0;
  for (std::int64_t generated = 1; generated < 30; ++generated)
    now += limits({decoding(generated, 0.0, 30 - generated)}, now).finetune_ms;
  EXPECT_NEAR(100.0 * 29.0 - now, 50.0, 2.0);
}

TEST(StepLimits, AMarginMakesTheReserveLargerAndTheLongestStepShorter) {
  EXPECT_DOUBLE_EQ(limits({decoding(11, 0.0)}, 900.0, 20.0, 0.4).finetune_ms, 100.0 + (100.0 - 70.0) / 8.0);
  EXPECT_DOUBLE_EQ(limits({decoding(11, 0.0)}, 300.0, 20.0, 0.5).prefill_ms, 120.0);
  EXPECT_DOUBLE_EQ(limits({decoding(11, 0.0)}, 1000.0, 20.0, 0.4).prefill_ms, 100.0 - 20.0 / 8.0);
}

TEST(StepLimits, WhoIsLostLimitsNoMoreThanAny) {
  const Sequence lost = decoding(2, 0.0, 3);  // 900 ms behind; three steps of 20 would win back 240
  EXPECT_DOUBLE_EQ(limits({lost}, 1000.0).finetune_ms, 100.0);
  const Sequence last = decoding(2, 0.0, 1);  // 60 behind, and the last step may win back 80
  EXPECT_DOUBLE_EQ(limits({last}, 160.0).prefill_ms, 40.0);
}

TEST(StepLimits, TheTightestDecides) {
  std::vector<Sequence> sequences{decoding(5, 0.0), decoding(3, 0.0)};
  sequences[0].id = 7;
  sequences[1].slo_class = 1;
  const std::vector<SLO> objectives{kSlo, {.tpot_ms = 300.0}};
  const std::vector<Sequence*> running{&sequences[0], &sequences[1]};
  const StepLimits limit = step_limits(running, objectives, 440.0, 20.0, 0.0);
  ASSERT_NE(limit.tightest, nullptr);
  EXPECT_EQ(limit.tightest->id, 7);
  EXPECT_DOUBLE_EQ(limit.slack_ms, -40.0);
  EXPECT_DOUBLE_EQ(limit.finetune_ms, 73.75);
}

}  // namespace
}  // namespace flexcore
