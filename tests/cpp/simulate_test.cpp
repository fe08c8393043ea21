#include "flexcore/simulate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "flexcore/error.h"

namespace flexcore {
namespace {

SimulationConfig machine() {
  SimulationConfig config;
  config.num_layers = 4;
  config.step_time_ms = {{"any_forward", 10.0},    {"decode_rows", 1.0},           {"prefill_tokens", 0.5},
                         {"finetune_tokens", 0.5}, {"backward_layer_tokens", 0.3}, {"any_finetune", 2.0}};
  config.duration_ms = 20'000.0;
  return config;
}

std::vector<SimulatedRequest> steady(double every_ms, int count) {
  std::vector<SimulatedRequest> requests;
  for (int i = 0; i < count; ++i)
    requests.push_back({.arrival_ms = every_ms * i, .prompt_tokens = 40, .output_tokens = 20});
  return requests;
}

std::vector<double> last_tokens(const Simulation& simulation) {
  std::vector<double> times;
  for (const auto& answer : simulation.answers) times.push_back(answer.token_ms.back());
  return times;
}

TEST(Simulate, OneRequestTakesWhatItsStepsTake) {
  const Simulation alone = simulate({{.arrival_ms = 100.0, .prompt_tokens = 40, .output_tokens = 3}}, {}, machine());
  ASSERT_EQ(alone.steps.size(), 3u);
  EXPECT_EQ(alone.answers[0].token_ms, (std::vector<double>{130.0, 141.0, 152.0}));
  EXPECT_TRUE(alone.answers[0].kept);
}

TEST(Simulate, KeepsObjectivesWhileItTrains) {
  const SimulatedJob job{.lengths = {300, 120, 512}, .batch_size = 4};
  SimulationConfig config = machine();
  config.noise = 0.05;
  config.between_steps_ms = 0.5;
  const auto requests = steady(250.0, 80);
  const Simulation both = simulate(requests, {job}, config);
  const Simulation alone = simulate({}, {job}, config);
  int kept = 0;
  for (const auto& answer : both.answers) kept += answer.kept;
  EXPECT_EQ(kept, 80);
  EXPECT_GT(both.trained_tokens, 0.5 * alone.trained_tokens);
  EXPECT_LT(both.trained_tokens, alone.trained_tokens);
  EXPECT_EQ(both.blocks_free, config.num_blocks);
  config.engine.policy = "token-cap:256";  // which knows no objective
  kept = 0;
  for (const auto& answer : simulate(requests, {job}, config).answers) kept += answer.kept;
  EXPECT_LT(kept, 40);
}

TEST(Simulate, SameArgumentsSameResult) {
  SimulationConfig config = machine();
  config.noise = 0.1;
  config.stall_share = 0.01;
  config.stall_ms = 80.0;
  const auto run = [&] { return simulate(steady(90.0, 100), {{.lengths = {200}}}, config); };
  const Simulation a = run(), b = run();
  EXPECT_EQ(last_tokens(a), last_tokens(b));
  EXPECT_EQ(a.end_ms, b.end_ms);
  EXPECT_EQ(a.trained_tokens, b.trained_tokens);
  config.engine.seed = 1;
  EXPECT_NE(last_tokens(run()), last_tokens(a));
}

TEST(Simulate, ClassesHaveObjectivesOfTheirOwn) {
  SimulationConfig config = machine();
  config.engine.slo_classes = {{"batch", {.tpot_ms = 1000.0, .ttft_ms = 60'000.0}}};
  auto requests = steady(250.0, 40);
  const double strict = simulate(requests, {{.lengths = {300}}}, config).trained_tokens;
  for (auto& request : requests) request.slo_class = "batch";
  const Simulation relaxed = simulate(requests, {{.lengths = {300}}}, config);
  EXPECT_GT(relaxed.trained_tokens, strict);
  for (const auto& answer : relaxed.answers) EXPECT_TRUE(answer.kept);
}

TEST(Simulate, RefusesBadArguments) {
  const auto refused = [](const char* text, const std::vector<SimulatedRequest>& requests,
                          const std::vector<SimulatedJob>& jobs, const SimulationConfig& config) {
    try {
      simulate(requests, jobs, config);
      ADD_FAILURE() << text;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  SimulationConfig none;
  refused("step_time_ms", {}, {}, none);
  SimulationConfig unknown = machine();
  unknown.step_time_ms["decoding"] = 1.0;
  refused("decoding", {}, {}, unknown);
  refused("requests[1].arrival_ms", {{.arrival_ms = 5.0}, {.arrival_ms = 4.0}}, {}, machine());
  refused("requests[0].output_tokens", {{.output_tokens = 0}}, {}, machine());
  refused("requests[0].prompt_tokens", {{.prompt_tokens = std::int64_t{1} << 50}}, {}, machine());
  refused("requests[0].arrival_ms", {{.arrival_ms = HUGE_VAL}}, {}, machine());
  refused("slo_class", {{.slo_class = "fast"}}, {}, machine());
  refused("jobs[0].lengths", {}, {{}}, machine());
  refused("jobs[0].batch_size", {}, {{.lengths = {4}, .batch_size = std::int64_t{1} << 62}}, machine());
  SimulationConfig deep = machine();
  deep.num_layers = std::int64_t{1} << 62;
  refused("num_layers", {}, {}, deep);
  SimulationConfig for_nothing = machine();
  for_nothing.step_time_ms = {{"decode_rows", 1.0}};
  for_nothing.duration_ms = 10.0;
  refused("steps took no time", {}, {{.lengths = {4}}}, for_nothing);
  SimulationConfig noisy = machine();
  noisy.noise = -1.0;
  refused("noise", {}, {}, noisy);
}

}  // namespace
}  // namespace flexcore
