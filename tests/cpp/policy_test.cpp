#include "sched/policy.h"

#include <gtest/gtest.h>

#include "flexcore/error.h"
#include "scheduler_fixture.h"

namespace flexcore {
namespace {

using testing::World;

CostModel costs() {
  std::vector<double> coefficients(CostModel::kTerms);
  const auto names = CostModel::term_names();
  for (std::size_t i = 0; i < names.size(); ++i) {
    const std::string_view name = names[i];
    coefficients[i] = name == "any_forward"                                   ? 10.0
                      : name == "finetune_tokens" || name == "prefill_tokens" ? 0.5
                      : name == "backward_layer_tokens"                       ? 0.25
                                                                              : 0.0;
  }
  CostModel model;
  model.restore(coefficients);
  return model;
}

World world(const std::string& policy) {
  return World({.max_num_seqs = 8, .max_num_batched_tokens = 64, .num_layers = 2, .policy = policy}, 512);
}

struct Trained {
  std::int64_t forward = 0, layer_rows = 0;
  explicit Trained(const StepPlan& plan)
      : forward(plan.features.finetune_tokens), layer_rows(plan.features.backward_layer_tokens) {}
  bool any() const { return forward + layer_rows > 0; }
};

TEST(Policy, NamesThatAreNone) {
  for (const char* name : {"", "hybrid:3", "temporal", "temporal:", "temporal:0", "temporal:-4", "temporal:4x",
                           "temporal:4:5", "token-cap:99999999999999999999", "spatial"}) {
    EXPECT_THROW(make_policy(name), InvalidArgument) << name;
  }
  EXPECT_THROW(world("none"), InvalidArgument);
}

TEST(Policy, InferenceOnlyTrainsNever) {
  World w = world("inference-only");
  w.cost = costs();
  w.scheduler.add_job(1, 1.0);
  w.example(1, 40);
  EXPECT_FALSE(w.scheduler.has_training());
  w.request(10, 5);
  while (w.scheduler.has_inference()) EXPECT_FALSE(Trained(w.step()).any());
}

TEST(Policy, FinetuneOnlyServesWhenTheJobsAreDone) {
  World w = world("finetune-only");
  w.cost = costs();
  w.scheduler.add_job(1, 1.0);
  w.example(1, 100);
  w.request(10, 5);
  while (w.scheduler.has_training()) {
    const StepPlan plan = w.step();
    EXPECT_TRUE(plan.inference.empty());
    EXPECT_TRUE(Trained(plan).any());
  }
  w.run();
}

TEST(Policy, TemporalTakesATurnAfterSoManySteps) {
  World w = world("temporal:5");
  w.cost = costs();
  w.request(10, 100);
  w.step();  // alone
  w.scheduler.add_job(1, 1.0);
  for (int i = 0; i < 50; ++i) w.example(1, 100);
  std::vector<bool> trains;
  std::int64_t done = 0;
  for (int i = 0; i < 30; ++i) {
    const StepPlan plan = w.step();
    EXPECT_NE(plan.inference.empty(), !Trained(plan).any());
    trains.push_back(Trained(plan).any());
    for (const auto& s : w.training) done += s->done;
  }
  // Four sequences of 100 tokens through 64 rows a pass are seven windows forward, then everything goes backward.
  std::string pattern;
  for (const bool t : trains) pattern += t ? 'T' : '.';
  EXPECT_EQ(pattern, "....TTTTTTTT.....TTTTTTTT.....");
  EXPECT_GT(done, 0);
  w.run();
}

TEST(Policy, DynamicTemporalGivesWayToLoad) {
  // Inference steps of 20 ms until a turn, after a minute of arrivals with `before_ms` between them and two seconds of
  // ones with `now_ms`.
  const auto steps_to_turn = [](double before_ms, double now_ms, std::int64_t waiting) {
    const auto policy = make_policy("dynamic-temporal");
    for (double at = 0.0; at < 60'000.0; at += before_ms) policy->arrived(at);
    for (double at = 60'000.0; at < 62'000.0; at += now_ms) policy->arrived(at);
    StepPlan plan;
    plan.inference.emplace_back();
    Load load{.now_ms = 62'000.0, .inference = true, .training = true, .num_waiting = waiting};
    int steps = 0;
    for (; policy->serves(load); ++steps) policy->stepped(plan, 0);
    return steps;
  };
  EXPECT_EQ(steps_to_turn(500.0, 500.0, 0), 64);
  EXPECT_EQ(steps_to_turn(500.0, 500.0, 2), 3 * 64);
  EXPECT_EQ(steps_to_turn(500.0, 500.0, 100), 512);
  EXPECT_GT(steps_to_turn(500.0, 100.0, 0), 100);
  EXPECT_EQ(steps_to_turn(500.0, 2000.0, 0), 64);
}

TEST(Policy, TokenCapCountsRequestsToo) {
  World w = world("token-cap:40");
  w.cost = costs();
  w.scheduler.add_job(1, 1.0);
  for (int i = 0; i < 60; ++i) w.example(1, 30);
  w.request(10, 30);
  w.scheduler.set_objective(0, {.tpot_ms = 1e-3});  // which it does not know
  const StepPlan first = w.step();
  EXPECT_EQ(first.features.prefill_tokens, 10);
  EXPECT_EQ(first.features.finetune_tokens, 30);
  bool backward = false;
  while (w.scheduler.has_inference()) {
    const StepPlan plan = w.step();
    const Trained trained(plan);
    EXPECT_LE(trained.forward + trained.layer_rows / 2, 39);
    EXPECT_TRUE(trained.any());
    backward = backward || trained.layer_rows > 0;
  }
  EXPECT_TRUE(backward);
  w.run();
}

}  // namespace
}  // namespace flexcore
