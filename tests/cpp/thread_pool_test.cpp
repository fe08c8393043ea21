#include "core/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "flexcore/error.h"

namespace flexcore {
namespace {

TEST(ThreadPool, EveryWorkerNumberRunsOnce) {
  for (const int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (int round = 0; round < 2000; ++round) {
      std::vector<int> calls(static_cast<std::size_t>(threads), 0);
      pool.run([&](int worker) { ++calls[static_cast<std::size_t>(worker)]; });
      ASSERT_EQ(calls, std::vector<int>(static_cast<std::size_t>(threads), 1)) << "round " << round;
    }
  }
}

TEST(ThreadPool, RangesCoverEveryIndexOnce) {
  ThreadPool pool(3);
  for (const std::int64_t count : {0, 1, 2, 3, 10, 1001}) {
    std::vector<int> seen(static_cast<std::size_t>(count), 0);
    pool.parallel_for(count, 2, [&](std::int64_t begin, std::int64_t end, int) {
      for (auto i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
    });
    pool.parallel_for_each(count, [&](std::int64_t i, int) { ++seen[static_cast<std::size_t>(i)]; });
    EXPECT_EQ(std::accumulate(seen.begin(), seen.end(), std::int64_t{0}), 2 * count);
    for (const int n : seen) EXPECT_EQ(n, 2);
  }
}

TEST(ThreadPool, ExceptionReachesTheCallerAndThePoolGoesOn) {
  ThreadPool pool(2);
  for (int failing = 0; failing < 2; ++failing) {
    EXPECT_THROW(pool.run([&](int worker) {
      if (worker == failing) throw std::runtime_error("from a worker");
    }),
                 std::runtime_error);
    std::atomic<int> calls{0};
    pool.run([&](int) { ++calls; });
    EXPECT_EQ(calls, 2);
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which need address space of their own
TEST(ThreadPool, GivesUpWhenTheSystemHasNoMoreThreads) {
  std::int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &limit), 0);
  rlimit tight = limit;
  tight.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (rlim_t{256} << 20);  // a few stacks
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
  EXPECT_THROW(ThreadPool(1024), DeviceError);
  ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
  ThreadPool pool(3);
  std::atomic<int> calls{0};
  pool.run([&](int) { ++calls; });
  EXPECT_EQ(calls, 3);
}
#endif

TEST(ThreadPool, RefusesNegativeCounts) { EXPECT_THROW(ThreadPool(-1), InvalidArgument); }

}  // namespace
}  // namespace flexcore
