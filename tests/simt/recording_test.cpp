#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "op_fixture.h"
#include "ops/scatter.h"

namespace flexcore::test {
namespace {

// Another part of the process waits for the whole device while a batch is recorded: there is no recording this time, no
// error, and the next attempt is as good as any.
TEST(Recording, ThatSomebodySpoiltIsNone) {
  OpFixture ops(1);
  MemoryLedger ledger;
  Matrix x(DType::kFloat32, 3, 5);
  const auto zero = [&] { run(ops.context(), ZeroArgs{x.view()}); };
  for (const bool spoilt : {true, false, true}) {
    const auto recorded = test_runtime().record(
        ops.context(), ledger,
        [&] {
          zero();
          if (spoilt) {
            EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorStreamCaptureUnsupported);
          }
          zero();
        },
        nullptr);
    EXPECT_EQ(recorded == nullptr, spoilt);
    x.set(1, 2, 7.0f);
    if (recorded == nullptr)
      zero();
    else
      EXPECT_TRUE(recorded->replay());
    test_runtime().synchronize();
    EXPECT_EQ(x(1, 2), 0.0f);
  }
}

TEST(DeviceAllocator, KeepsLargeBlocksForTheNext) {
  Allocator& memory = test_runtime().allocator();
  memory.trim();
  const std::size_t before = simt::device_bytes(), size = 5 << 20;
  void* first = memory.allocate(size);
  memory.deallocate(first, size);
  EXPECT_EQ(simt::device_bytes(), before + size);
  void* larger = memory.allocate(size + 1);
  EXPECT_NE(larger, first);
  void* other = memory.allocate(size / 2);  // would waste half
  EXPECT_NE(other, first);
  void* again = memory.allocate(size - size / 10);  // fits
  EXPECT_EQ(again, first);
  memory.deallocate(again, size - size / 10);
  EXPECT_EQ(memory.allocate(size), first);  // it is as large as before
  memory.deallocate(first, size);
  memory.deallocate(other, size / 2);
  memory.deallocate(larger, size + 1);
  memory.trim();
  EXPECT_EQ(simt::device_bytes(), before);
}

}  // namespace
}  // namespace flexcore::test
