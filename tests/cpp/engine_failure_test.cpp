#include <gtest/gtest.h>

#include "backends/cpu/families.h"
#include "backends/register.h"
#include "engine/impl.h"
#include "engine_fixture.h"
#include "ops/attention.h"

namespace flexcore {
namespace {

// All ops but one that only the backward has.
OpRegistry without_attention_backward() {
  const OpRegistry all = make_op_registry();
  OpRegistry registry;
  cpu::register_linear(registry);
  cpu::register_lora(registry);
  cpu::register_elementwise(registry);
  cpu::register_cross_entropy(registry);
  cpu::register_optimizer(registry);
  cpu::register_scatter(registry);
  cpu::register_sampling(registry);
  cpu::register_transfer(registry);
  registry.add<KvWriteArgs>(DeviceKind::kCpu, all.get<KvWriteArgs>(DeviceKind::kCpu));
  registry.add<AttentionArgs>(DeviceKind::kCpu, all.get<AttentionArgs>(DeviceKind::kCpu));
  return registry;
}

class EngineFailureTest : public EngineTest {
 protected:
  void SetUp() override {
    impl_ = std::make_unique<Engine::Impl>(path(), small());
    impl_->adapters.create("a", {.r = 4}, 1);
  }
  RequestId submit() {
    return impl_->submit(
        {.prompt_token_ids = tokens(9, 2), .sampling = {.max_tokens = 12, .temperature = 0.0, .ignore_eos = true}});
  }
  std::vector<std::int32_t> tokens_of(RequestId id) {
    std::vector<std::int32_t> out;
    while (impl_->scheduler.has_inference() || impl_->scheduler.has_training()) take(impl_->step(), id, out);
    return out;
  }
  void take(const StepReport& report, RequestId id, std::vector<std::int32_t>& out) {
    for (const auto& event : report.outputs)
      if (event.request_id == id && event.token_id >= 0) out.push_back(event.token_id);
    finetune_.insert(finetune_.end(), report.finetune.begin(), report.finetune.end());
  }

  std::unique_ptr<Engine::Impl> impl_;
  std::vector<FinetuneEvent> finetune_;
};

TEST_F(EngineFailureTest, InTheMiddleOfTrainingFailsItsJobsAlone) {
  const FinetuneConfig config{.batch_size = 3};
  const auto wanted = tokens_of(submit());
  const JobId sound = impl_->start_job("a", examples(6), config);
  tokens_of(0);
  const double loss = impl_->find_job(sound).loss;

  impl_->adapters.remove("a");
  impl_->adapters.create("a", {.r = 4}, 1);
  const OpRegistry broken = without_attention_backward();
  impl_->context.registry = &broken;
  finetune_.clear();
  const JobId job = impl_->start_job("a", examples(6), config);
  EXPECT_EQ(tokens_of(submit()), wanted);
  EXPECT_EQ(impl_->find_job(job).status, JobStatus::kFailed);
  EXPECT_NE(impl_->find_job(job).error.find("attention_backward"), std::string::npos) << impl_->find_job(job).error;
  ASSERT_EQ(finetune_.size(), 1u);
  EXPECT_EQ(finetune_[0].status, JobStatus::kFailed);
  EXPECT_EQ(impl_->ledger.current(MemoryTag::kSavedActivations), 0u);
  EXPECT_EQ(impl_->ledger.current(MemoryTag::kGradients), 0u);
  EXPECT_EQ(impl_->blocks.num_free(), impl_->blocks.num_blocks());

  impl_->context.registry = &impl_->registry;
  const JobId again = impl_->start_job("a", examples(6), config);
  tokens_of(0);
  EXPECT_EQ(impl_->find_job(again).status, JobStatus::kSucceeded);
  EXPECT_EQ(impl_->find_job(again).loss, loss);
}

TEST_F(EngineFailureTest, OfRequestsAloneReachesTheCallerAndLosesNothing) {
  const auto wanted = tokens_of(submit());
  const RequestId id = submit();
  std::vector<std::int32_t> out;
  for (int i = 0; i < 3; ++i) take(impl_->step(), id, out);
  const RequestId other = submit();
  impl_->end_early(other, FinishReason::kCancelled);
  const OpRegistry empty;
  impl_->context.registry = &empty;
  EXPECT_THROW(impl_->step(), Unsupported);
  EXPECT_THROW(impl_->step(), Unsupported);
  impl_->context.registry = &impl_->registry;
  const StepReport report = impl_->step();
  EXPECT_TRUE(std::any_of(report.outputs.begin(), report.outputs.end(), [&](const TokenEvent& event) {
    return event.request_id == other && event.finish_reason == FinishReason::kCancelled;
  }));
  take(report, id, out);
  for (const auto token : tokens_of(id)) out.push_back(token);
  EXPECT_EQ(out, wanted);
}

}  // namespace
}  // namespace flexcore
