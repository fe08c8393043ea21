#include "sched/cost_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "sched/least_squares.h"

namespace flexcore {
namespace {

/// A machine that follows the law exactly, with noise and stalls on top.
struct Machine {
  double pass = 8.0, row = 0.12, context = 2e-5, prefill = 0.1, sampled = 0.05, jump = 6.0, finetune = 0.13;
  double layer_token = 0.011, layer_context = 1e-6, unit = 0.3;

  double truth(const StepFeatures& f) const {
    return (f.any_forward() ? pass : 0.0) + row * static_cast<double>(f.decode_rows) +
           context * static_cast<double>(f.decode_context + f.prefill_context + f.finetune_context) +
           prefill * static_cast<double>(f.prefill_tokens) + sampled * static_cast<double>(f.sampled_rows) +
           (f.any_finetune() ? jump : 0.0) + finetune * static_cast<double>(f.finetune_tokens) +
           layer_token * static_cast<double>(f.backward_layer_tokens) +
           layer_context * static_cast<double>(f.backward_layer_context) + unit * static_cast<double>(f.backward_units);
  }
};

class Workload {
 public:
  explicit Workload(unsigned seed) : random_(seed) {}

  StepFeatures step() {
    StepFeatures f;
    if (pick(4) > 0) f.decode_rows = 1 + pick(32);
    f.decode_context = f.decode_rows * (16 + pick(1500));
    if (pick(3) == 0) f.prefill_tokens = 1 + pick(256);
    f.prefill_context = f.prefill_tokens * (f.prefill_tokens + 2 * pick(500)) / 2;
    f.sampled_rows = f.decode_rows + (f.prefill_tokens > 0 && pick(2) == 0);
    if (pick(3) == 0) f.finetune_tokens = 16 + pick(200);
    f.finetune_context = f.finetune_tokens * (f.finetune_tokens + 2 * pick(300)) / 2;
    if (pick(3) == 0) f.backward_units = 1 + pick(20);
    f.backward_layer_tokens = f.backward_units * (16 + pick(300));
    f.backward_layer_context = f.backward_layer_tokens * (10 + pick(300));
    if (!f.any_forward() && !f.any_finetune()) f.decode_rows = f.sampled_rows = 1;
    return f;
  }
  double noisy(double ms, double sigma) { return ms * (1.0 + sigma * std::normal_distribution<>()(random_)); }
  int pick(int n) { return static_cast<int>(random_() % static_cast<unsigned>(n)); }

 private:
  std::mt19937 random_;
};

double mean_error(const CostModel& model, const Machine& machine, unsigned seed) {
  Workload workload(seed);
  double sum = 0.0;
  for (int i = 0; i < 200; ++i) {
    const StepFeatures f = workload.step();
    sum += std::abs(model.predict_ms(f) / machine.truth(f) - 1.0);
  }
  return sum / 200;
}

void expect_sane(const CostModel& model) {
  for (const double c : model.coefficients()) {
    ASSERT_TRUE(std::isfinite(c));
    ASSERT_GE(c, 0.0);
  }
  ASSERT_TRUE(model.margin() >= 0.0 && model.margin() <= 0.5);
  ASSERT_TRUE(model.overrun_share() >= 0.0 && model.overrun_share() <= 1.0);
}

std::vector<CostModel::Sample> probes(const Machine& machine, unsigned seed, int count, double sigma) {
  Workload workload(seed);
  std::vector<CostModel::Sample> samples;
  for (int i = 0; i < count; ++i) {
    const StepFeatures f = workload.step();
    samples.push_back({f, workload.noisy(machine.truth(f), sigma)});
  }
  return samples;
}

// At the minimum no slope is positive, and none is left where x is.
TEST(LeastSquares, NonNegativeSolutionIsOptimal) {
  std::mt19937 random(17);
  std::normal_distribution<> normal;
  for (int round = 0; round < 300; ++round) {
    SquareMatrix<12> a;
    set_diagonal(a, 1e-4);
    std::array<double, 12> b{};
    for (int sample = 0; sample < 1 + round % 30; ++sample) {
      std::array<double, 12> row;
      for (double& value : row) value = round % 3 == 0 ? normal(random) : std::abs(normal(random));
      add_outer(a, row, 1.0);
      const double target = normal(random) + round % 2;
      for (std::size_t i = 0; i < 12; ++i) b[i] += target * row[i];
    }
    const auto x = solve_non_negative(a, b);
    const auto product = multiply(a, x);
    const double tolerance = 1e-7 * std::sqrt(dot(b, b));
    for (std::size_t i = 0; i < 12; ++i) {
      ASSERT_GE(x[i], 0.0);
      ASSERT_LT(b[i] - product[i], tolerance);
      ASSERT_LT(x[i] > 0.0 ? std::abs(b[i] - product[i]) : 0.0, tolerance);
    }
  }
}

TEST(CostModel, KnowsNothingAtFirst) {
  CostModel model;
  EXPECT_FALSE(model.fitted());
  EXPECT_EQ(model.predict_ms({.decode_rows = 4, .decode_context = 100, .sampled_rows = 4}), 0.0);
  EXPECT_EQ(model.margin(), 0.0);
  EXPECT_EQ(CostModel::term_names().size(), static_cast<std::size_t>(CostModel::kTerms));
  EXPECT_EQ(model.coefficients().size(), static_cast<std::size_t>(CostModel::kTerms));
}

TEST(CostModel, FitRecoversExactTruth) {
  const Machine machine;
  CostModel model;
  model.fit(probes(machine, 1, 120, 0.0));
  EXPECT_TRUE(model.fitted());
  EXPECT_LT(mean_error(model, machine, 2), 2e-3);
  EXPECT_LT(model.margin(), 0.02);
  EXPECT_EQ(model.predict_ms({}), 0.0);
  expect_sane(model);
}

TEST(CostModel, FitSurvivesNoiseAndStalls) {
  const Machine machine;
  auto samples = probes(machine, 3, 120, 0.03);
  for (std::size_t i = 5; i < samples.size(); i += 15) samples[i].measured_ms *= 30.0;
  CostModel model;
  model.fit(samples);
  EXPECT_LT(mean_error(model, machine, 4), 0.04);
  expect_sane(model);
}

TEST(CostModel, LearnsOnlineFromNothing) {
  const Machine machine;
  CostModel model;
  Workload workload(5);
  for (int i = 0; i < 400; ++i) {
    const StepFeatures f = workload.step();
    model.observe(f, workload.noisy(machine.truth(f), 0.02));
    expect_sane(model);
  }
  EXPECT_TRUE(model.fitted());
  EXPECT_EQ(model.num_observed(), 400);
  EXPECT_LT(mean_error(model, machine, 6), 0.04);
  EXPECT_LT(model.margin(), 0.15);
}

TEST(CostModel, FollowsDrift) {
  Machine machine;
  CostModel model;
  model.fit(probes(machine, 7, 100, 0.02));
  Workload workload(8);
  const auto run = [&](int steps) {
    for (int i = 0; i < steps; ++i) {
      const StepFeatures f = workload.step();
      model.observe(f, workload.noisy(machine.truth(f), 0.02));
    }
  };
  run(100);
  machine = {.pass = 16,
             .row = 0.2,
             .context = 4e-5,
             .prefill = 0.2,
             .sampled = 0.1,
             .jump = 9,
             .finetune = 0.3,
             .layer_token = 0.02,
             .layer_context = 2e-6,
             .unit = 0.5};
  run(80);
  EXPECT_LT(mean_error(model, machine, 9), 0.15);
  run(300);
  EXPECT_LT(mean_error(model, machine, 9), 0.05);
  machine = {};
  run(400);
  EXPECT_LT(mean_error(model, machine, 9), 0.05);
  expect_sane(model);
}

TEST(CostModel, OneStallChangesLittle) {
  const Machine machine;
  CostModel model;
  model.fit(probes(machine, 10, 100, 0.02));
  Workload workload(11);
  for (int i = 0; i < 300; ++i) {
    const StepFeatures f = workload.step();
    const double before = model.predict_ms(f);
    const bool stall = i % 40 == 39;
    model.observe(f, workload.noisy(machine.truth(f), 0.02) * (stall ? 50.0 : 1.0));
    if (stall) {
      EXPECT_LT(model.predict_ms(f), 1.1 * before);
    }
  }
  EXPECT_LT(mean_error(model, machine, 12), 0.05);
  EXPECT_LT(model.margin(), 0.1);
  EXPECT_GT(model.overrun_share(), 0.0);
}

TEST(CostModel, MarginIsTheUpperQuantileOfTheError) {
  const Machine machine;
  CostModel model;
  model.fit(probes(machine, 13, 200, 0.0));
  Workload workload(14);
  int within = 0;
  for (int i = 0; i < 1000; ++i) {
    const StepFeatures f = workload.step();
    const double measured = workload.noisy(machine.truth(f), 0.1);
    within += i >= 200 && measured <= model.predict_ms(f) * (1.0 + model.margin());
    model.observe(f, measured);
  }
  EXPECT_NEAR(within / 800.0, 0.95, 0.03);
  EXPECT_GT(model.margin(), 0.1);
}

TEST(CostModel, DegenerateProbes) {
  const StepFeatures same{.decode_rows = 4, .decode_context = 400, .sampled_rows = 4};
  CostModel model;
  model.fit(std::vector<CostModel::Sample>(10, {same, 12.0}));
  EXPECT_NEAR(model.predict_ms(same), 12.0, 0.05);
  expect_sane(model);

  model.fit(std::vector<CostModel::Sample>(1, {same, 5.0}));
  EXPECT_NEAR(model.predict_ms(same), 5.0, 0.05);
  model.fit({});
  EXPECT_FALSE(model.fitted());
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  model.fit(std::vector<CostModel::Sample>{{same, nan}, {same, inf}, {same, -1.0}, {same, 0.0}, {{}, 3.0}});
  EXPECT_FALSE(model.fitted());
  expect_sane(model);
}

TEST(CostModel, BadTimesAreIgnored) {
  const StepFeatures f{.decode_rows = 1, .decode_context = 10, .sampled_rows = 1};
  CostModel model;
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), -1.0, 0.0})
    model.observe(f, bad);
  model.observe({}, 3.0);
  EXPECT_EQ(model.num_observed(), 0);
  expect_sane(model);
}

// Long runs that excite one direction only, then another; huge and tiny steps; stalls.
TEST(CostModel, StaysSaneForever) {
  Workload workload(15);
  CostModel model;
  const StepFeatures decode{.decode_rows = 2, .decode_context = 64, .sampled_rows = 2};
  for (int i = 0; i < 20000; ++i) model.observe(decode, workload.noisy(3.0, 0.05));
  EXPECT_NEAR(model.predict_ms(decode), 3.0, 0.3);
  const StepFeatures backward{.backward_layer_tokens = 4096, .backward_layer_context = 1 << 20, .backward_units = 8};
  for (int i = 0; i < 3; ++i) model.observe(backward, 200.0);
  EXPECT_NEAR(model.predict_ms(backward), 200.0, 20.0);  // what is new is learned at once
  EXPECT_NEAR(model.predict_ms(decode), 3.0, 0.3);
  for (int i = 0; i < 5000; ++i) {
    const double size = std::pow(10.0, workload.pick(9) - 4);
    model.observe(workload.step(), size * (1 + workload.pick(100)));
    expect_sane(model);
  }
  const Machine machine;
  for (int i = 0; i < 600; ++i) {
    const StepFeatures f = workload.step();
    model.observe(f, workload.noisy(machine.truth(f), 0.02));
  }
  EXPECT_LT(mean_error(model, machine, 16), 0.1);
  expect_sane(model);
}

TEST(CostModel, SwapsAreTimedApart) {
  CostModel model;
  model.set_swap_ms(2.0);
  model.restore(std::vector<double>(CostModel::kTerms, 1.0));
  EXPECT_EQ(model.swap_ms(3), 6.0);
  model.fit({});
  EXPECT_EQ(model.swap_ms(3), 6.0);
  model.observe_swap(10, 5.0);  // the first takes the place of what was assumed
  EXPECT_EQ(model.swap_ms(2), 1.0);
  model.observe_swap(10, 9.0);
  EXPECT_DOUBLE_EQ(model.swap_ms(1), 0.75 * 0.5 + 0.25 * 0.9);
  const double before = model.swap_ms(1);
  model.observe_swap(0, 5.0);
  model.observe_swap(1, -1.0);
  model.observe_swap(1, std::numeric_limits<double>::infinity());
  EXPECT_EQ(model.swap_ms(1), before);
}

}  // namespace
}  // namespace flexcore
