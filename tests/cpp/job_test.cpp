#include "train/job.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "flexcore/error.h"

namespace flexcore {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

TrainingJob job_of(std::int64_t count, const FinetuneConfig& config) {
  const Example example{{1, 2, 3}, {1, 2, 3}};
  return TrainingJob(1, "a", std::vector<Example>(static_cast<std::size_t>(count), example), config);
}

TEST(TrainingJob, EveryEpochHasEachExampleOnce) {
  for (const std::int64_t count : {1, 2, 7, 8, 9}) {
    for (const std::int64_t batch_size : {std::int64_t{1}, std::int64_t{2}, std::int64_t{8}, kHuge - 1, kHuge}) {
      TrainingJob job = job_of(count, {.num_epochs = 3, .batch_size = batch_size});
      EXPECT_EQ(job.steps_per_epoch(), batch_size >= count ? 1 : (count + batch_size - 1) / batch_size);
      EXPECT_EQ(job.total_steps(), 3 * job.steps_per_epoch());
      std::vector<std::int64_t> seen;
      for (; job.epoch() < 1; ++job.step) {
        const auto batch = job.batch();
        seen.insert(seen.end(), batch.begin(), batch.end());
      }
      std::sort(seen.begin(), seen.end());
      std::vector<std::int64_t> wanted(static_cast<std::size_t>(count));
      std::iota(wanted.begin(), wanted.end(), 0);
      EXPECT_EQ(seen, wanted) << count << " by " << batch_size;
    }
  }
}

TEST(TrainingJob, KeepsNoExamplesWhenItHasEnded) {
  TrainingJob job = job_of(5, {.num_epochs = 4, .batch_size = 2});
  job.step = 12;
  job.release();
  EXPECT_EQ(job.examples.capacity(), 0u);
  EXPECT_EQ(job.total_steps(), 12);
  EXPECT_EQ(job.epoch(), 4);
}

TEST(FinetuneConfig, IsJudgedByTheFloatsThatItBecomes) {
  EXPECT_NO_THROW(check(FinetuneConfig{}));
  EXPECT_NO_THROW(check({.num_epochs = 1'000'000, .batch_size = kHuge}));
  EXPECT_THROW(check({.num_epochs = std::int64_t{1} << 40}), InvalidArgument);
  EXPECT_THROW(check({.learning_rate = 1e39}), InvalidArgument);
  EXPECT_THROW(check({.weight_decay = 1e300}), InvalidArgument);
  EXPECT_THROW(check({.betas = {0.9, 1.0 - 1e-12}}), InvalidArgument);
  EXPECT_THROW(check({.eps = 1e-50}), InvalidArgument);
  EXPECT_THROW(check({.eps = 1e50}), InvalidArgument);
}

}  // namespace
}  // namespace flexcore
