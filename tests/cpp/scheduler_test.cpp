#include "sched/scheduler.h"

#include <gtest/gtest.h>

#include "flexcore/error.h"
#include "scheduler_fixture.h"

namespace flexcore {
namespace {

using testing::simple_costs;
using testing::small;
using testing::World;

TEST(Scheduler, OneRequest) {
  World world(small(), 16);
  const Sequence& s = world.request(40, 3);
  EXPECT_EQ(world.scheduler.num_waiting(), 1);
  const StepPlan prefill = world.step();
  EXPECT_EQ(prefill.explain, "decode 0, prefill 40, s=0, units 0: predicted 0.0 of 100.0 ms");
  EXPECT_TRUE(prefill.inference[0].sample);
  EXPECT_FALSE(prefill.inference[0].decode);
  const StepPlan decode = world.step();
  EXPECT_TRUE(decode.inference[0].decode);
  EXPECT_EQ(decode.features.decode_context, 41);
  EXPECT_EQ(world.run(), 1);
  EXPECT_EQ(s.num_generated(), 3);
  EXPECT_EQ(world.blocks.num_free(), 16);
  EXPECT_TRUE(world.scheduler.plan(0).empty());
}

TEST(Scheduler, DecodeComesBeforePrefillChunksInOrder) {
  World world(small(), 64);
  world.request(10, 20);
  world.request(10, 20);
  world.step();
  const Sequence& a = world.request(100, 2);
  world.request(30, 2);
  const StepPlan first = world.step();
  EXPECT_EQ(first.features.decode_rows, 2);
  EXPECT_EQ(first.features.prefill_tokens, 62);
  EXPECT_EQ(first.inference.back().sequence, &a);
  EXPECT_FALSE(first.inference.back().sample);
  const StepPlan second = world.step();
  EXPECT_EQ(second.features.prefill_tokens, 62);  // 38 of a, 24 of the next
  EXPECT_EQ(second.features.sampled_rows, 3);
}

TEST(Scheduler, PrefixesAreSharedWithinAKey) {
  World world(small(), 64);
  const std::vector<std::int32_t> prompt(50, 7);
  world.request(prompt, 2);
  world.step();
  const Sequence& same = world.request(prompt, 2);
  Sequence& other = world.request(prompt, 2);
  other.cache_key = 1;
  Sequence& unwilling = world.request(prompt, 2);
  unwilling.use_prefix_cache = false;
  world.step();
  world.step();
  world.step();
  EXPECT_EQ(same.num_cached_tokens, 48);
  EXPECT_EQ(other.num_cached_tokens, 0);
  EXPECT_EQ(unwilling.num_cached_tokens, 0);
  world.run();
}

TEST(Scheduler, SlotsLimitAdmission) {
  SchedulerConfig config = small();
  config.max_num_seqs = 2;
  World world(config, 64);
  for (int i = 0; i < 5; ++i) world.request(4, 4);
  world.step();
  EXPECT_EQ(world.scheduler.num_running(), 2);
  EXPECT_EQ(world.scheduler.num_waiting(), 3);
  world.run();
}

TEST(Scheduler, TheYoungestIsPreemptedAndBothFinish) {
  World world(small(), 5, 16, false);
  world.request(30, 40);
  Sequence& young = world.request(30, 40);
  bool preempted = false;
  while (world.scheduler.has_inference()) {
    const StepPlan plan = world.step();
    preempted = preempted || !plan.preempted.empty();
    for (const Sequence* s : plan.preempted) EXPECT_EQ(s, &young);
  }
  EXPECT_TRUE(preempted);
  EXPECT_EQ(young.num_generated(), 40);
}

TEST(Scheduler, CancelFreesAtOnce) {
  World world(small(), 8);
  Sequence& running = world.request(64, 10);
  Sequence& waiting = world.request(64, 10);
  world.request(64, 10);
  world.step();
  EXPECT_EQ(world.blocks.num_free(), 4);
  world.scheduler.finish(&running);
  world.scheduler.finish(&waiting);
  world.scheduler.finish(&waiting);
  EXPECT_EQ(world.blocks.num_free(), 8);
  EXPECT_EQ(world.scheduler.num_waiting(), 1);
  world.run();
}

TEST(Scheduler, CancelledBetweenPlanAndCommit) {
  World world(small(), 8);
  Sequence& s = world.request(60, 10);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& t = world.example(1, 20);
  StepPlan plan = world.scheduler.plan(0);
  world.scheduler.finish(&s);
  world.scheduler.commit(plan);
  EXPECT_EQ(s.num_computed_tokens, 0);
  plan = world.scheduler.plan(0);
  world.scheduler.remove_job(1);
  world.scheduler.commit(plan);
  EXPECT_EQ(t.forward_done, 0);
  EXPECT_EQ(world.blocks.num_free(), 8);
}

TEST(Scheduler, TrainingGoesForwardThenBackwardInSharedUnits) {
  World world(small(), 64);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& a = world.example(1, 20);
  TrainSequence& b = world.example(1, 30);
  a.first_layer = b.first_layer = 1;
  const StepPlan forward = world.step();
  EXPECT_EQ(forward.forward.size(), 2u);
  EXPECT_TRUE(forward.backward.empty());
  EXPECT_TRUE(a.in_backward() && b.in_backward());
  EXPECT_EQ(a.layer, 3);
  const StepPlan backward = world.step();
  ASSERT_EQ(backward.backward.size(), 3u);  // layers 3, 2, 1
  for (const BackwardUnit& unit : backward.backward) EXPECT_EQ(unit.windows.size(), 2u);
  EXPECT_TRUE(a.done && b.done);
  EXPECT_EQ(world.blocks.num_free(), 64);
  EXPECT_FALSE(world.scheduler.has_training());
}

TEST(Scheduler, BackwardWaitsForSiblings) {
  World world(small(), 64);
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& a = world.example(1, 50);
  const TrainSequence& b = world.example(1, 50);
  EXPECT_TRUE(world.step().backward.empty());
  EXPECT_TRUE(a.in_backward());
  EXPECT_TRUE(world.step().backward.empty());
  EXPECT_TRUE(b.in_backward());
  EXPECT_EQ(world.step().features.backward_units, 8);  // 4 layers, 50 + 14 and 36 rows
  EXPECT_TRUE(a.done && b.done);
}

TEST(Scheduler, FixedWindowsAreExact) {
  World world(small(), 64);
  world.scheduler.add_job(1, 1.0);
  world.example(1, 20, 7, 6);
  std::vector<std::int64_t> forward, backward;
  while (world.scheduler.has_training()) {
    const StepPlan plan = world.step();
    for (const TrainWindow& w : plan.forward) forward.push_back(w.end);
    for (const BackwardUnit& unit : plan.backward)
      for (const TrainWindow& w : unit.windows) backward.push_back(w.begin);
  }
  EXPECT_EQ(forward, (std::vector<std::int64_t>{7, 14, 20}));
  ASSERT_EQ(backward.size(), 16u);
  EXPECT_EQ(std::vector<std::int64_t>(backward.begin(), backward.begin() + 4),
            (std::vector<std::int64_t>{14, 8, 2, 0}));
}

TEST(Scheduler, FixedWindowsWaitForRows) {
  World world(small(), 64);
  world.scheduler.add_job(1, 1.0);
  world.request(40, 2);
  const TrainSequence& t = world.example(1, 60, 30);
  EXPECT_TRUE(world.step().forward.empty());  // 24 rows are left
  EXPECT_EQ(world.step().forward.at(0).end, 30);
  world.run();
  EXPECT_TRUE(t.done);
  const TrainSequence& large = world.example(1, 100, 90);  // larger than any step
  EXPECT_EQ(world.step().forward.at(0).end, 64);
  world.run();
  EXPECT_TRUE(large.done);
}

TEST(Scheduler, InFlightTokensAreLimited) {
  SchedulerConfig config = small();
  config.max_finetune_tokens_in_flight = 50;
  World world(config, 64);
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& a = world.example(1, 80);
  const TrainSequence& b = world.example(1, 20);
  const TrainSequence& c = world.example(1, 20);
  const TrainSequence& d = world.example(1, 20);
  while (!a.done) {
    EXPECT_FALSE(b.started);
    world.step();
  }
  world.step();
  EXPECT_TRUE(b.started && c.started && !d.started);
  world.run();
}

TEST(Scheduler, StepsStayWithinTheirBudget) {
  SchedulerConfig config = small();
  config.objectives[0].tpot_ms = 30.0;
  World world(config, 128);
  world.cost = simple_costs();
  world.scheduler.add_job(1, 1.0);
  for (int i = 0; i < 40; ++i) world.example(1, 100);
  world.request(20, 60);
  int full = 0;
  while (world.scheduler.has_inference()) {
    const StepPlan plan = world.step();
    EXPECT_LE(plan.predicted_ms, plan.budget_ms) << plan.explain;
    full += plan.predicted_ms > 0.7 * plan.budget_ms;
  }
  EXPECT_GT(full, 55);
  const StepPlan idle = world.step();  // nobody waits: whole steps
  EXPECT_EQ(idle.budget_ms, 500.0);
  world.run();
}

TEST(Scheduler, PrefillIsCutForThoseWhoDecode) {
  SchedulerConfig config = small();
  config.objectives[0].tpot_ms = 25.0;
  config.min_prefill_tokens = 8;
  World world(config, 64);
  world.cost = simple_costs();
  world.request(10, 30);
  EXPECT_EQ(world.step().features.prefill_tokens, 10);
  world.request(200, 5);
  const StepPlan cut = world.step();
  EXPECT_LE(cut.predicted_ms, 25.0);
  EXPECT_GT(cut.features.prefill_tokens, 30);
  world.scheduler.set_objective(0, {1.0, 4000.0});  // out of reach: twice a step that only decodes
  const StepPlan late = world.step();
  EXPECT_GT(late.features.prefill_tokens, 0);
  EXPECT_LE(late.predicted_ms,
            2.0 * world.cost.predict_ms({.decode_rows = 1, .decode_context = 20, .sampled_rows = 1}));
  world.scheduler.set_objective(0, {12.0, 100.0});
  world.now_ms += 80.0;  // none to the first token: the least chunk
  EXPECT_EQ(world.step().features.prefill_tokens, 8);
}

TEST(Scheduler, FinetuningIsNeverStarved) {
  for (const double share : {0.0, 0.02, 0.2}) {
    SchedulerConfig config = small();
    config.objectives[0].tpot_ms = 1.0;  // out of reach
    config.min_finetune_share = share;
    World world(config, 256);
    world.cost = simple_costs();
    world.scheduler.add_job(1, 1.0);
    for (int i = 0; i < 100; ++i) world.example(1, 40);
    world.request(4, 400);
    double all_ms = 0.0, finetune_ms = 0.0;
    for (int i = 0; i < 300; ++i) {
      const StepPlan plan = world.step();
      all_ms += plan.predicted_ms;
      finetune_ms += plan.finetune_ms;
      EXPECT_EQ(plan.floor, plan.features.any_finetune());
      EXPECT_LE(plan.features.finetune_tokens, config.min_finetune_tokens);
      EXPECT_LE(plan.features.backward_units, 1);
    }
    EXPECT_NEAR(finetune_ms / all_ms, share, 0.01) << share;
  }
}

TEST(Scheduler, ALateFirstTokenIsNotHeldUp) {
  World world(small(), 64);
  world.cost = simple_costs();
  world.scheduler.add_job(1, 1.0);
  world.example(1, 200);
  world.step();
  world.request(200, 4);
  world.now_ms += 1500.0;
  EXPECT_FALSE(world.step().features.any_finetune());
}

TEST(Scheduler, JobsShareByWeight) {
  World world(small(), 256);
  world.cost = simple_costs();
  world.scheduler.add_job(1, 1.0);
  world.scheduler.add_job(2, 3.0);
  std::map<std::int64_t, double> ms;
  std::int64_t program = 0;
  for (int i = 0; i < 200; ++i)
    for (const std::int64_t id : {1, 2}) world.example(id, 60).program = program++ % 2;  // no unit is shared
  world.scheduler.set_objective(0, {40.0, 100.0});
  for (int i = 0; i < 150; ++i) {
    const StepPlan plan = world.step();
    for (const TrainWindow& w : plan.forward) ms[w.sequence->job_id] += 0.5 * static_cast<double>(w.end - w.begin);
    for (const BackwardUnit& unit : plan.backward)
      for (const TrainWindow& w : unit.windows) ms[w.sequence->job_id] += 0.1 * static_cast<double>(w.end - w.begin);
  }
  EXPECT_NEAR(ms[2] / ms[1], 3.0, 0.5);
}

TEST(Scheduler, JobsOfOneProgramShareUnits) {
  World world(small(), 64);
  world.scheduler.add_job(1, 1.0);
  world.scheduler.add_job(2, 1.0);
  world.example(1, 20);
  world.example(2, 20);
  EXPECT_EQ(world.step().forward.size(), 2u);
  const StepPlan plan = world.step();
  ASSERT_EQ(plan.backward.size(), 4u);
  EXPECT_EQ(plan.backward[0].windows.size(), 2u);
}

TEST(Scheduler, ForwardPhasesGiveTheirPagesToRequests) {
  World world(small(), 8);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& t = world.example(1, 100);
  world.step();
  EXPECT_EQ(t.forward_done, 64);
  world.request(60, 4);
  const StepPlan plan = world.step();
  ASSERT_EQ(plan.restarted.size(), 1u);
  EXPECT_EQ(plan.restarted[0], &t);
  EXPECT_EQ(plan.features.prefill_tokens, 60);
  world.run();
  EXPECT_TRUE(t.done);
}

TEST(Scheduler, BackwardPhasesAreRunToTheirEnd) {
  World world(small(), 8);
  world.cost = simple_costs();
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10);
  while (!t.in_backward()) world.step();
  world.scheduler.set_objective(0, {1.0, 2000.0});  // no time for anything
  Sequence& s = world.request(60, 4);
  int steps = 0;
  for (; !t.done; ++steps) {
    const StepPlan plan = world.step();
    EXPECT_TRUE(plan.restarted.empty());
    EXPECT_GE(plan.features.backward_units, 1);
  }
  EXPECT_LE(steps, 40);
  world.run();
  EXPECT_EQ(s.num_generated(), 4);
}

TEST(Scheduler, PausedJobsWorkOnlyForTheirPages) {
  World world(small(), 8);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& t = world.example(1, 60, 0, 10);
  world.step();
  ASSERT_TRUE(t.in_backward());
  world.scheduler.pause_job(1, true);
  EXPECT_FALSE(world.scheduler.has_training());
  EXPECT_TRUE(world.step().empty());
  world.request(60, 4);
  EXPECT_FALSE(world.step().features.any_finetune());  // there is room for both
  world.run();
  EXPECT_FALSE(t.done);
  world.request(100, 4);  // needs the pages
  world.run();
  EXPECT_TRUE(t.done);
}

TEST(Scheduler, PausedForwardPhasesMakeRoomForOtherJobs) {
  World world(small(), 8);
  world.scheduler.add_job(1, 1.0);
  world.scheduler.add_job(2, 1.0);
  const TrainSequence& a = world.example(1, 100);
  world.step();
  world.scheduler.pause_job(1, true);
  const TrainSequence& b = world.example(2, 100);
  world.run();
  EXPECT_TRUE(b.done);
  EXPECT_FALSE(a.started);
  world.scheduler.pause_job(1, false);
  world.run();
  EXPECT_TRUE(a.done);
}

TEST(Scheduler, RefusesWhatCouldNeverRun) {
  World world(small(), 4);
  EXPECT_THROW(world.request(65, 4), OutOfMemory);
  EXPECT_THROW(world.request(10, 56), OutOfMemory);
  EXPECT_THROW(world.request(0, 4), InvalidArgument);
  EXPECT_THROW(world.example(1, 4), InvalidArgument);
  world.scheduler.add_job(1, 1.0);
  EXPECT_THROW(world.scheduler.add_job(1, 1.0), InvalidArgument);
  EXPECT_THROW(world.scheduler.add_job(2, 0.0), InvalidArgument);
  EXPECT_THROW(world.scheduler.pause_job(3, true), InvalidArgument);
  EXPECT_THROW(world.example(1, 0), InvalidArgument);
  EXPECT_THROW(world.example(1, 65), OutOfMemory);
  EXPECT_THROW(world.scheduler.set_objective(0, {0.0, 1.0}), InvalidArgument);
  EXPECT_THROW(Scheduler(SchedulerConfig{}, world.blocks, world.cost), InvalidArgument);  // num_layers is 0
  world.request(9, 56);
  world.run();
}

}  // namespace
}  // namespace flexcore
