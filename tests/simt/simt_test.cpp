#include "simt.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "backends/cuda/kernels/mma.cuh"

// The harness can fail: every mistake that it is there to find, made on purpose.
namespace flexcore::cuda {
namespace {

constexpr simt::Order kOrders[] = {simt::Order::kForward, simt::Order::kReverse, simt::Order::kShuffled};

class Simt : public testing::Test {
 protected:
  ~Simt() override { simt::set_order(before_); }

 private:
  simt::Order before_ = simt::order();
};
using SimtDeathTest = Simt;

/// Runs a kernel as one block; what the harness said of it.
template <class Kernel>
std::string complaint(unsigned threads, std::size_t shared_bytes, Kernel&& kernel) {
  try {
    simt::launch(1, threads, shared_bytes, kernel);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

int thread() { return static_cast<int>(threadIdx.x); }
float* shared_floats() { return reinterpret_cast<float*>(simt::shared_memory()); }

TEST_F(Simt, RunsEveryThreadOfEveryBlockInAnyOrder) {
  for (const auto order : kOrders) {
    simt::set_order(order, 3);
    std::vector<int> runs(3 * 2 * 40), sums(3 * 2);
    simt::launch({3, 2}, 40, 40 * sizeof(float), [&] {
      const int block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
      ++runs[static_cast<std::size_t>(block * 40 + thread())];
      shared_floats()[thread()] = static_cast<float>(thread());
      __syncthreads();
      if (thread() == 7)
        for (int i = 0; i < 40; ++i) sums[static_cast<std::size_t>(block)] += static_cast<int>(shared_floats()[i]);
    });
    EXPECT_EQ(runs, std::vector<int>(runs.size(), 1));
    EXPECT_EQ(sums, std::vector<int>(sums.size(), 40 * 39 / 2));
  }
}

TEST_F(Simt, SharedMemoryThatNobodyWroteIsNan) {
  std::vector<float> read(32);
  EXPECT_EQ(complaint(32, 32 * sizeof(float),
                      [&] {
                        if (thread() != 5) shared_floats()[thread()] = 1.0f;
                        __syncthreads();
                        read[static_cast<std::size_t>(thread())] = shared_floats()[thread()];
                      }),
            "");
  for (std::size_t i = 0; i < 32; ++i) EXPECT_EQ(std::isnan(read[i]), i == 5) << i;
}

// Each block starts anew: nothing is inherited from the block before.
TEST_F(Simt, SharedMemoryIsPoisonedForEveryBlock) {
  int numbers = 0;
  simt::launch(4, 1, sizeof(float), [&] {
    numbers += !std::isnan(shared_floats()[0]);
    shared_floats()[0] = 1.0f;
  });
  EXPECT_EQ(numbers, 0);
}

// A neighbour's value without a barrier: some order reads it before it is there.
TEST_F(Simt, AMissingBarrierShowsInSomeOrder) {
  for (const bool barrier : {true, false}) {
    int wrong = 0;
    for (const auto order : kOrders) {
      simt::set_order(order, 1);
      EXPECT_EQ(complaint(64, 64 * sizeof(float),
                          [&] {
                            shared_floats()[thread()] = 1.0f;
                            if (barrier) __syncthreads();
                            wrong += std::isnan(shared_floats()[(thread() + 1) % 64]);
                          }),
                "");
    }
    EXPECT_EQ(wrong > 0, !barrier);
  }
}

TEST_F(Simt, RefusesADivergentBarrier) {
  const auto waits = complaint(64, 0, [] { thread() < 20 ? __syncthreads() : __syncwarp(0xffff0000u); });
  EXPECT_NE(waits.find("simt: "), std::string::npos) << waits;
  const auto deadlock = complaint(64, 0, [] {
    if (thread() < 33) return __syncthreads();
    __syncwarp(0xffffffffu);
  });
  EXPECT_NE(deadlock.find("deadlock; from thread 0: __syncthreads at simt_test.cpp:"), std::string::npos) << deadlock;
  EXPECT_NE(deadlock.find("from thread 33: __syncwarp"), std::string::npos) << deadlock;
  const auto places = complaint(64, 0, [] {
    if (thread() % 2 == 0) __syncthreads();
    if (thread() % 2 == 1) __syncthreads();
  });
  EXPECT_NE(places.find("a barrier in two places"), std::string::npos) << places;
  // As on the device, who has returned is not waited for.
  EXPECT_EQ(complaint(64, 0,
                      [] {
                        if (thread() < 10) __syncthreads();
                      }),
            "");
}

TEST_F(Simt, RefusesCollectivesThatDoNotMatch) {
  const auto two = complaint(32, 0, [] {
    if (thread() < 16)
      __shfl_xor_sync(kAllLanes, 1.0f, 1);
    else
      __ballot_sync(kAllLanes, 1);
  });
  EXPECT_NE(two.find("lanes meet in __shfl_xor_sync and in __ballot_sync"), std::string::npos) << two;
  const auto masks = complaint(32, 0, [] { __syncwarp(thread() < 16 ? 0x0010ffffu : kAllLanes); });
  EXPECT_NE(masks.find("or with other masks"), std::string::npos) << masks;
  const auto outside = complaint(32, 0, [] { __syncwarp(0xffffu); });
  EXPECT_NE(outside.find("by a lane that is not in its mask"), std::string::npos) << outside;
  const auto returned = complaint(32, 0, [] {
    if (thread() != 3) __syncwarp();
  });
  EXPECT_NE(returned.find("a lane that has returned"), std::string::npos) << returned;
  const auto absent = complaint(20, 0, [] { __syncwarp(); });
  EXPECT_NE(absent.find("a lane that is not there"), std::string::npos) << absent;
}

// Lanes get each other's values, also where a lane runs ahead to the next exchange.
TEST_F(Simt, LanesExchangeWhatTheyBrought) {
  for (const auto order : kOrders) {
    simt::set_order(order, 5);
    std::vector<int> got(64);
    simt::launch(1, 64, 0, [&] {
      int x = thread();
      for (int i = 0; i < 40; ++i) x = __shfl_sync(kAllLanes, x, (simt::lane() + 1) % 32);
      got[static_cast<std::size_t>(thread())] = x;
      EXPECT_EQ(__ballot_sync(kAllLanes, simt::lane() % 2), 0xaaaaaaaau);
    });
    for (int i = 0; i < 64; ++i) EXPECT_EQ(got[static_cast<std::size_t>(i)], i / 32 * 32 + (i % 32 + 40) % 32);
  }
}

TEST_F(Simt, ACopyArrivesAtTheWaitThatCoversIt) {
  alignas(16) const float source[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  // How many groups are left behind by each wait -> whether the first and the second copy are there.
  const auto read = [&](auto&& wait) {
    std::vector<bool> there;
    EXPECT_EQ(complaint(1, 32,
                        [&] {
                          cp_async16(shared_floats(), source, true);
                          cp_async_commit();
                          cp_async16(shared_floats() + 4, source + 4, true);
                          cp_async_commit();
                          wait();
                          for (const int i : {3, 7}) there.push_back(shared_floats()[i] == source[i]);
                        }),
              "");
    return there;
  };
  EXPECT_EQ(read([] {}), (std::vector{false, false}));
  EXPECT_EQ(read([] { cp_async_wait<2>(); }), (std::vector{false, false}));
  EXPECT_EQ(read([] { cp_async_wait<1>(); }), (std::vector{true, false}));
  EXPECT_EQ(read([] { cp_async_wait<0>(); }), (std::vector{true, true}));
  float missing = -1, never_closed = -1;
  EXPECT_EQ(complaint(1, 32,
                      [&] {
                        cp_async4(shared_floats(), source, false);
                        cp_async_commit();
                        cp_async4(shared_floats() + 1, source, true);
                        cp_async_wait<0>();
                        missing = shared_floats()[0], never_closed = shared_floats()[1];
                      }),
            "");
  EXPECT_EQ(missing, 0.0f);
  EXPECT_TRUE(std::isnan(never_closed));
  const auto odd = complaint(1, 32, [&] { cp_async16(shared_floats() + 1, source, true); });
  EXPECT_NE(odd.find("cp.async of an address that is not aligned to 16"), std::string::npos) << odd;
}

// A wait is the copying thread's; the others need a barrier after it.
TEST_F(Simt, ACopyNeedsABarrierForOthers) {
  alignas(16) const float source[64 * 4] = {};
  for (const bool barrier : {true, false}) {
    int wrong = 0;
    for (const auto order : kOrders) {
      simt::set_order(order, 2);
      EXPECT_EQ(complaint(64, sizeof source,
                          [&] {
                            cp_async16(shared_floats() + 4 * thread(), source, true);
                            cp_async_commit();
                            cp_async_wait<0>();
                            if (barrier) __syncthreads();
                            wrong += std::isnan(shared_floats()[4 * ((thread() + 1) % 64)]);
                          }),
                "");
    }
    EXPECT_EQ(wrong > 0, !barrier);
  }
}

TEST_F(Simt, RefusesWhatADeviceRefuses) {
  EXPECT_NE(complaint(1025, 0, [] {}).find("bad launch"), std::string::npos);
  EXPECT_NE(complaint(0, 0, [] {}).find("bad launch"), std::string::npos);
  EXPECT_NE(complaint(1, (227 << 10) + 1, [] {}).find("bytes of shared memory"), std::string::npos);
  EXPECT_NE(complaint(1, 0, [] { simt::launch(1, 1, 0, [] {}); }).find("launch inside a kernel"), std::string::npos);
  const auto odd = complaint(32, 64, [] {
    unsigned r[4];
    load_matrices(r, simt::shared_memory() + 8);
  });
  EXPECT_NE(odd.find("ldmatrix of an address that is not aligned to 16"), std::string::npos) << odd;
  // After a failure the next kernel runs.
  EXPECT_EQ(complaint(64, 0, [] { __syncthreads(); }), "");
}

TEST_F(Simt, DeviceMemoryStartsAsNan) {
  float* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), sizeof(float)), cudaSuccess);
  float value = 0;
  ASSERT_EQ(cudaMemcpyAsync(&value, data, sizeof value, cudaMemcpyDeviceToHost, nullptr), cudaSuccess);
  EXPECT_TRUE(std::isnan(value));
  cudaFree(data);
}

#if defined(__SANITIZE_ADDRESS__)
void store(float* at) { *at = 1.0f; }

TEST_F(SimtDeathTest, AddressesOutOfBoundsEndTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto shared = [](int index) { simt::launch(1, 1, 4 * sizeof(float), [=] { shared_floats()[index] = 1.0f; }); };
  shared(3);
  EXPECT_DEATH(shared(4), "heap-buffer-overflow");
  EXPECT_DEATH(shared(-1), "heap-buffer-overflow");

  float* data = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&data), 5 * sizeof(float)), cudaSuccess);
  simt::launch_kernel(store, 1, 1, 0, nullptr, data + 4);
  EXPECT_DEATH(simt::launch_kernel(store, 1, 1, 0, nullptr, data + 5), "heap-buffer-overflow");
  EXPECT_DEATH(*data = 2.0f, "use-after-poison");  // the host's access to device memory
  cudaFree(data);
  EXPECT_DEATH(simt::launch_kernel(store, 1, 1, 0, nullptr, data), "heap-use-after-free");
}
#endif

}  // namespace
}  // namespace flexcore::cuda
