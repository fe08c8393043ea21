#include <gtest/gtest.h>

#include <limits>

#include "cuda_runtime.h"
#include "engine_fixture.h"
#include "flexcore/plan.h"

namespace flexcore {
namespace {

class OutOfMemoryTest : public EngineTest {
 protected:
  ~OutOfMemoryTest() override { simt::limit_device_bytes(std::numeric_limits<std::size_t>::max()); }
  static std::string refusal(const auto& call) {
    try {
      call();
    } catch (const OutOfMemory& error) {
      return error.what();
    }
    return "";
  }
};

TEST_F(OutOfMemoryTest, AtTheStartSaysWhatIsHeldAndGivesItBack) {
  const std::size_t before = simt::device_bytes();
  std::size_t whole = 0;
  {
    const Engine engine = load();
    whole = simt::device_bytes() - before;
  }
  ASSERT_EQ(simt::device_bytes(), before);
  for (int part = 0; part < 8; ++part) {
    simt::limit_device_bytes(before + whole * static_cast<std::size_t>(part) / 8);
    const std::string text = refusal([&] { load(); });
    EXPECT_NE(text.find("held: weights"), std::string::npos) << text;
    EXPECT_EQ(simt::device_bytes(), before) << "with " << part << " eighths";
  }
  simt::limit_device_bytes(before + whole + (1 << 20));  // gradients for a moment, while steps are measured
  Engine engine = load();
  engine.submit(
      {.prompt_token_ids = tokens(9, 2), .sampling = {.max_tokens = 3, .temperature = 0.0, .ignore_eos = true}});
  EXPECT_EQ(drain(engine).begin()->second.size(), 3u);
}

TEST_F(OutOfMemoryTest, OfAJobLeavesTheRequestsAlone) {
  Engine engine = load();
  engine.create_adapter("a", {.r = 4});
  const auto submit = [&] {
    return engine.submit(
        {.prompt_token_ids = tokens(9, 2), .sampling = {.max_tokens = 4, .temperature = 0.0, .ignore_eos = true}});
  };
  const auto wanted = [&](RequestId id) { return drain(engine).at(id); }(submit());

  const auto bytes_of_job = plan(path(), small(), LoraConfig{.r = 4}, 60);
  simt::limit_device_bytes(simt::device_bytes());
  EXPECT_NE(refusal([&] { engine.create_adapter("b", {.r = 4}); }).find("for adapters"), std::string::npos);
  const auto start = [&] { return engine.finetune("a", std::vector<Example>(4, {tokens(60, 9), tokens(60, 9)})); };
  EXPECT_NE(refusal(start).find("for gradients"), std::string::npos);  // nothing has begun
  EXPECT_TRUE(engine.jobs().empty());
  EXPECT_EQ(drain(engine).size(), 0u);

  // Gradients and two moments, but no next version of the adapter; what sequences keep is in the pool.
  simt::limit_device_bytes(simt::device_bytes() + static_cast<std::size_t>(bytes_of_job.optimizer) * 3 / 2);
  const JobId job = start();
  const RequestId id = submit();
  EXPECT_EQ(drain(engine).at(id), wanted);
  EXPECT_EQ(engine.job(job).status, JobStatus::kFailed);
  EXPECT_NE(engine.job(job).error.find("for adapters; held: weights"), std::string::npos) << engine.job(job).error;

  simt::limit_device_bytes(std::numeric_limits<std::size_t>::max());
  const JobId again = start();
  drain(engine);
  EXPECT_EQ(engine.job(again).status, JobStatus::kSucceeded);
}

}  // namespace
}  // namespace flexcore
