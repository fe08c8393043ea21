// Training sequences whose pages go to host memory and come back.

#include <gtest/gtest.h>

#include "flexcore/error.h"
#include "scheduler_fixture.h"

namespace flexcore {
namespace {

using testing::simple_costs;
using testing::small;
using testing::World;

TEST(SchedulerSwap, BackwardPhasesGoToHostPagesForRequests) {
  World world(small(), 12, 16, true, 12);
  world.cost = simple_costs();
  world.cost.set_swap_ms(0.01);
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10, 4);
  world.scheduler.set_objective(0, {20.0, 80.0});  // short steps
  while (!t.in_backward() || t.rows_left == t.length) world.step();
  const std::int64_t layer = t.layer, rows = t.rows_left;
  world.request(60, 4);
  const StepPlan plan = world.step();
  EXPECT_EQ(plan.features.prefill_tokens, 60);  // at once
  ASSERT_EQ(plan.swapped.size(), 1u);
  EXPECT_EQ(plan.swapped[0], &t);
  EXPECT_EQ(plan.moves.size(), 11u);
  EXPECT_TRUE(plan.restarted.empty() && t.swapped_out() && !t.started);
  EXPECT_TRUE(t.layer == layer && t.rows_left == rows);
  EXPECT_NE(plan.explain.find("swapped out 1"), std::string::npos);
  world.run();
  EXPECT_TRUE(t.done);
  EXPECT_EQ(world.blocks_swapped, 22);
}

TEST(SchedulerSwap, ForwardPhasesGoToHostPagesWhenThatIsFaster) {
  for (const bool fast : {true, false}) {
    World world(small(), 8, 16, true, 8);
    world.cost = simple_costs();
    world.cost.set_swap_ms(fast ? 0.01 : 1000.0);
    world.scheduler.add_job(1, 1.0);
    const TrainSequence& t = world.example(1, 100);
    while (t.forward_done == 0) world.step();
    ASSERT_FALSE(t.in_backward());
    const std::int64_t done = t.forward_done;
    world.request(60, 4);
    const StepPlan plan = world.step();
    EXPECT_EQ(plan.swapped.size(), fast ? 1u : 0u);
    EXPECT_EQ(plan.restarted.size(), fast ? 0u : 1u);
    EXPECT_EQ(t.forward_done, fast ? done : 0);
    world.run();
    EXPECT_TRUE(t.done);
  }
}

TEST(SchedulerSwap, BackwardPhasesThatAreNearlyDoneStay) {
  World world(small(), 8, 16, true, 8);
  world.cost = simple_costs();
  world.cost.set_swap_ms(1000.0);
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10);
  while (!t.in_backward()) world.step();
  world.request(60, 4);
  world.run();
  EXPECT_TRUE(t.done);
  EXPECT_EQ(world.blocks_swapped, 0);
}

TEST(SchedulerSwap, WhoComesBackStaysForAWhile) {
  World world(small(), 12, 16, true, 12);
  world.cost = simple_costs();
  world.cost.set_swap_ms(1.0);
  world.scheduler.set_objective(0, {20.0, 80.0});
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10, 4);
  while (!t.in_backward()) world.step();
  // Somebody always waits: the floor alone brings it back.
  int swaps = 0;
  double worked_ms = 0.0, least_ms = 1e9;
  bool back = false;
  for (int i = 0; i < 20000 && !t.done; ++i) {
    while (world.scheduler.num_waiting() < 3) world.request(60, 4);
    const StepPlan plan = world.step();
    for (const auto& unit : plan.backward)
      for (const auto& window : unit.windows) worked_ms += window.predicted_ms;
    if (!plan.swapped.empty()) {
      ++swaps;
      if (back) least_ms = std::min(least_ms, worked_ms);
    }
    if (!plan.started.empty()) worked_ms = 0.0, back = true;
  }
  EXPECT_TRUE(t.done);
  EXPECT_GE(swaps, 1);
  EXPECT_LE(swaps, 6);
  EXPECT_GE(least_ms, 15.0);  // of the 22 that the way out and back takes; pieces are not cut to it
}

TEST(SchedulerSwap, ALongWayBackIsSavedUpFor) {
  World world(small(), 16, 16, true, 8);
  world.cost = simple_costs();
  world.cost.set_swap_ms(5.0);
  world.scheduler.set_objective(0, {20.0, 80.0});
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10);
  while (!t.in_backward()) world.step();
  world.scheduler.pause_job(1, true);
  Sequence& large = world.request(230, 4);
  world.step();
  ASSERT_TRUE(t.swapped_out());
  world.scheduler.finish(&large);
  world.scheduler.pause_job(1, false);
  // 35 ms are more than any step has left beside a request that decodes.
  world.request(16, 100);
  world.run();
  EXPECT_TRUE(t.done);
  EXPECT_EQ(world.blocks_swapped, 14);
}

TEST(SchedulerSwap, PausedBackwardPhasesGoToHostPages) {
  World world(small(), 8, 16, true, 8);
  world.cost.set_swap_ms(1000.0);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& t = world.example(1, 60, 0, 10);
  world.step();
  ASSERT_TRUE(t.in_backward());
  world.scheduler.pause_job(1, true);
  world.request(100, 4);
  EXPECT_EQ(world.step().features.prefill_tokens, 64);
  EXPECT_TRUE(t.swapped_out());
  world.run();
  EXPECT_FALSE(t.done);
  world.scheduler.pause_job(1, false);
  world.run();
  EXPECT_TRUE(t.done);
}

// What is kept in host memory stays there when the rest goes there too.
TEST(SchedulerSwap, OffloadedStoresStayWhereTheyAre) {
  World world(small(), 12, 16, true, 20);
  world.cost = simple_costs();
  world.cost.set_swap_ms(0.01);
  world.scheduler.add_job(1, 1.0);
  const TrainSequence& t = world.example(1, 100, 0, 10, 4, 8);
  world.scheduler.set_objective(0, {20.0, 80.0});
  while (!t.in_backward()) world.step();
  EXPECT_EQ(t.host_store.first, 12 + 20 - 8);
  world.request(60, 4);
  EXPECT_EQ(world.step().swapped.size(), 1u);
  EXPECT_EQ(world.blocks.num_free_host(), 20 - 8 - 11);
  EXPECT_EQ(t.host_store.first, 12 + 20 - 8);
  world.run();
  EXPECT_TRUE(t.done);
  EXPECT_EQ(world.blocks_swapped, 22);
  EXPECT_EQ(world.blocks.num_free_host(), 20);
}

TEST(SchedulerSwap, WhatWasSwappedOutMakesWayForOffloadedStores) {
  World world(small(), 24, 16, true, 20);
  world.cost = simple_costs();
  world.cost.set_swap_ms(0.01);
  for (const std::int64_t id : {1, 2, 3}) world.scheduler.add_job(id, 1.0);
  const TrainSequence &a = world.example(1, 100, 0, 10, 2), &b = world.example(2, 100, 0, 10, 2);
  world.scheduler.set_objective(0, {20.0, 80.0});
  while (!a.in_backward() || !b.in_backward()) world.step();
  world.request(300, 40);
  world.step();
  ASSERT_TRUE(a.swapped_out() && b.swapped_out());
  const bool a_is_first = a.host_table[0] < b.host_table[0];
  const TrainSequence& last = a_is_first ? b : a;
  world.scheduler.remove_job(a_is_first ? 1 : 2);
  const std::int64_t moved = world.moves;
  const TrainSequence& c = world.example(3, 16, 0, 0, 0, 11);
  while (!c.started) world.step();
  EXPECT_TRUE(last.swapped_out());
  EXPECT_EQ(world.moves, moved + 2);
  world.run();
  EXPECT_TRUE(last.done && c.done);
}

TEST(SchedulerSwap, OffloadedStoresWaitForEachOther) {
  World world(small(), 40, 16, true, 10);
  world.scheduler.add_job(1, 1.0);
  world.scheduler.add_job(2, 1.0);
  const TrainSequence &a = world.example(1, 60, 0, 10, 2, 7), &b = world.example(2, 60, 0, 10, 2, 7);
  world.step();
  EXPECT_TRUE(a.started && !b.started);
  world.run();
  EXPECT_TRUE(a.done && b.done);
  EXPECT_THROW(world.example(1, 60, 0, 10, 2, 11), OutOfMemory);
}

// Nobody else is at work: what paused jobs have in host memory begins again, or is worked off where it is in backward.
TEST(SchedulerSwap, PausedJobsMakeRoomForOffloadedStores) {
  for (const bool backward : {false, true}) {
    World world(small(), 24, 16, true, 12);
    world.cost = simple_costs();
    world.cost.set_swap_ms(0.01);
    world.scheduler.add_job(1, 1.0);
    world.scheduler.add_job(2, 1.0);
    const TrainSequence& t = world.example(1, 100, 0, 10, 2, 3);
    while (backward ? !t.in_backward() : t.forward_done == 0) world.step();
    world.scheduler.pause_job(1, true);
    world.paused.insert(1);
    Sequence& large = world.request(300, 4);  // nearly the whole pool
    world.step();
    ASSERT_TRUE(t.swapped_out());
    world.scheduler.finish(&large);
    const TrainSequence& other = world.example(2, 60, 0, 10, 2, 11);
    int restarted = 0;
    for (int i = 0; i < 200 && !other.done; ++i) restarted += static_cast<int>(world.step().restarted.size());
    EXPECT_TRUE(other.done);
    EXPECT_EQ(t.done, backward);
    EXPECT_EQ(restarted > 0, !backward);
    world.paused.clear();
    world.scheduler.pause_job(1, false);
    world.run();
    EXPECT_TRUE(t.done);
  }
}

// One that would be worked off comes back to pages of a forward phase that is paused too.
TEST(SchedulerSwap, PausedForwardPhasesMakeWayForPausedBackwardOnes) {
  World world(small(), 24, 16, true, 20);
  world.cost = simple_costs();
  world.cost.set_swap_ms(0.01);
  for (const std::int64_t id : {1, 2, 3}) world.scheduler.add_job(id, 1.0);
  const auto pause = [&](std::int64_t id) {
    world.scheduler.pause_job(id, true);
    world.paused.insert(id);
  };
  const TrainSequence& p = world.example(1, 100, 0, 10, 9, 3);
  while (!p.in_backward()) world.step();
  pause(1);
  Sequence& large = world.request(300, 4);
  world.step();
  ASSERT_TRUE(p.swapped_out());
  world.scheduler.finish(&large);
  const TrainSequence& q = world.example(2, 60, 10, 0, 5);
  world.step();
  ASSERT_TRUE(q.started && !q.in_backward());
  pause(2);
  const TrainSequence& a = world.example(3, 16, 0, 0, 0, 2);
  for (int i = 0; i < 300 && !a.done; ++i) EXPECT_FALSE(world.step().empty());
  EXPECT_TRUE(a.done && p.done && !q.done);
  for (const std::int64_t id : {1, 2}) world.scheduler.pause_job(id, false);
  world.paused.clear();
  world.run();
  EXPECT_TRUE(q.done);
}

TEST(SchedulerSwap, RemovedJobsGiveHostPagesBack) {
  World world(small(), 8, 16, true, 8);
  world.scheduler.add_job(1, 1.0);
  TrainSequence& t = world.example(1, 60, 0, 10);
  world.step();
  world.request(100, 4);
  world.step();
  ASSERT_TRUE(t.swapped_out());
  EXPECT_EQ(world.blocks.num_free_host(), 4);
  world.scheduler.remove_job(1);
  EXPECT_EQ(world.blocks.num_free_host(), 8);
  world.run();
}

}  // namespace
}  // namespace flexcore
