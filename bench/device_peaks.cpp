#include "device_peaks.h"

#include <algorithm>
#include <chrono>

#include "cases/array.h"
#include "ops/linear.h"
#include "ops/optimizer.h"

namespace flexcore::bench {

namespace {

constexpr std::int64_t kCopyBytes = std::int64_t{1} << 30;  // many times any cache
constexpr std::int64_t kBFloat16Side = 8192, kFloat32Side = 4096;
constexpr int kRepeats = 5, kCalls = 10;

/// Seconds of one call, of the fastest row of them.
template <class Call>
double fastest(DeviceRuntime& device, Call&& call) {
  double best = 1e30;
  for (int i = 0; i <= kRepeats; ++i) {  // the first warms up
    device.synchronize();
    const auto start = std::chrono::steady_clock::now();
    for (int j = 0; j < kCalls; ++j) call();
    device.synchronize();
    const std::chrono::duration<double> row = std::chrono::steady_clock::now() - start;
    if (i > 0) best = std::min(best, row.count() / kCalls);
  }
  return best;
}

double gemm_flops(OpContext& context, DeviceRuntime& device, DType dtype, std::int64_t side) {
  const cases::Array x(dtype, {side, side}, cases::Noise{1}), weight(dtype, {side, side}, cases::Noise{2, 0.01f});
  const cases::Array y(dtype, {side, side}, 0.0f);
  const LinearArgs::Member member{{weight.view().data(), dtype, side, side, false}, {}, y.view()};
  const LinearArgs args{x.view(), {&member, 1}};
  return 2.0 * static_cast<double>(side * side * side) / fastest(device, [&] { run(context, args); });
}

}  // namespace

Peaks measure_device_peaks(OpContext& context, DeviceRuntime& device) {
  Peaks peaks;
  {
    MemoryLedger ledger;
    const Buffer from(device.allocator(), ledger, MemoryTag::kWorkspace, kCopyBytes);
    const Buffer to(device.allocator(), ledger, MemoryTag::kWorkspace, kCopyBytes);
    const TensorView numbers = from.view(DType::kFloat32, {kCopyBytes / 4});
    double squares = 0;
    peaks.copy_bandwidth = 2.0 * kCopyBytes / fastest(device, [&] {
                             device.allocator().copy(to.data(), from.data(), static_cast<std::size_t>(kCopyBytes));
                           });
    peaks.read_bandwidth = kCopyBytes / fastest(device, [&] { run(context, SumSquaresArgs{{&numbers, 1}, &squares}); });
    peaks.read_bandwidth = std::max(peaks.read_bandwidth, peaks.copy_bandwidth);
  }
  peaks.float32_flops = gemm_flops(context, device, DType::kFloat32, kFloat32Side);
  peaks.bfloat16_flops = gemm_flops(context, device, DType::kBFloat16, kBFloat16Side);
  return peaks;
}

}  // namespace flexcore::bench
