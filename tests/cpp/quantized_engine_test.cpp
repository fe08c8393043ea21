#include <cmath>
#include <optional>

#include "engine_fixture.h"
#include "flexcore/plan.h"

namespace flexcore {
namespace {

class QuantizedEngineTest : public EngineTest, public ::testing::WithParamInterface<const char*> {
 protected:
  static EngineConfig quantized() {
    EngineConfig config;
    config.quantization = GetParam();
    config.quantization_group_size = 32;  // of 32 and 48 inputs: a short group too
    return config;
  }
};
INSTANTIATE_TEST_SUITE_P(Formats, QuantizedEngineTest, ::testing::Values("int8", "int4", "nf4"));

TEST_P(QuantizedEngineTest, TakesTheWeightsThatWerePlanned) {
  Engine engine = load(quantized());
  const auto dense = load().memory().at("weights");
  EXPECT_EQ(engine.memory().at("weights"), plan(path(), small(quantized()), {}, 90).weights);
  EXPECT_LT(engine.memory().at("weights"), dense);
  EXPECT_EQ(engine.model().quantization, GetParam());
  EXPECT_EQ(engine.model().quantization_group_size, 32);
}

TEST_P(QuantizedEngineTest, ServesWhileItTrains) {
  Engine engine = load(quantized());
  engine.create_adapter("a", {.r = 4}, 1);
  const JobId job = engine.finetune("a", examples(6), {.num_epochs = 2, .batch_size = 2, .learning_rate = 0.01});
  std::vector<RequestId> ids;
  for (int i = 0; i < 12; ++i)
    ids.push_back(engine.submit({tokens(3 + 2 * i, i), {.max_tokens = 9, .temperature = 0}}));
  std::vector<FinetuneEvent> events;
  const auto out = drain(engine, &events);
  for (const auto id : ids) EXPECT_EQ(out.at(id).size(), 9u);
  EXPECT_EQ(engine.job(job).status, JobStatus::kSucceeded);
  std::vector<double> losses;
  for (const auto& event : events)
    if (event.target_tokens > 0) losses.push_back(event.loss);
  ASSERT_EQ(losses.size(), 6u);
  EXPECT_LT(losses[3] + losses[4] + losses[5], losses[0] + losses[1] + losses[2]);
}

TEST_P(QuantizedEngineTest, AnySplitGivesTheSameGradients) {
  Engine engine = load(quantized());
  engine.create_adapter("a", {.r = 4}, 1);
  engine.finetune("a", examples(2), {.batch_size = 2, .learning_rate = 0.05});  // B is no longer zero
  drain(engine);
  const auto batch = examples(3);
  const auto whole = engine.loss_and_gradients("a", batch);
  for (const auto& [forward, backward] : {std::pair<std::int64_t, std::int64_t>{5, 0}, {0, 7}, {16, 9}}) {
    const auto split = engine.loss_and_gradients("a", batch, forward, backward);
    EXPECT_NEAR(split.loss, whole.loss, 1e-5 * whole.loss);
    ASSERT_EQ(split.gradients.size(), whole.gradients.size());
    for (std::size_t i = 0; i < whole.gradients.size(); ++i) {
      double difference = 0, norm = 0;
      for (std::size_t j = 0; j < whole.gradients[i].data.size(); ++j) {
        difference += std::pow(split.gradients[i].data[j] - whole.gradients[i].data[j], 2);
        norm += std::pow(whole.gradients[i].data[j], 2);
      }
      EXPECT_GT(norm, 0) << whole.gradients[i].name;
      EXPECT_LE(std::sqrt(difference), 2e-5 * std::sqrt(norm)) << whole.gradients[i].name;
    }
  }
}

TEST_F(EngineTest, RefusesQuantizationsThatAreNotThere) {
  for (const auto& [quantization, group] : {std::pair<const char*, std::int64_t>{"int2", 64}, {"int4", 40}}) {
    EngineConfig config;
    config.quantization = quantization;
    config.quantization_group_size = group;
    EXPECT_THROW(load(config), InvalidArgument);
    EXPECT_THROW(plan(path(), small(config), {}, 90), InvalidArgument);
  }
}

}  // namespace
}  // namespace flexcore
