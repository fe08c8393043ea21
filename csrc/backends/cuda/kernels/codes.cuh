#pragma once

#include "backends/cuda/kernels/elementwise.cuh"

namespace flexcore::cuda {

// Codes in groups of 64 (ops/scatter.h): a warp a group, two elements a lane.
inline constexpr int kCodeGroup = 64, kCodeWarps = 8;

__device__ __forceinline__ unsigned bf16_enlarged(float x) { return (__float_as_uint(x) + 0xffffu) >> 16; }
__device__ __forceinline__ float bf16_widened(unsigned x) { return __uint_as_float(x << 16); }

/// Grid: (rows, groups in blocks of kCodeWarps). Floor: a row read and its codes written.
__global__ void __launch_bounds__(kCodeWarps* kWarpSize)
    quantize_rows_kernel(const Rows x, const RowStore* stores, std::int64_t offset, std::int64_t width,
                         std::int64_t row_bytes) {
  const RowStore to = stores[blockIdx.x];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t group =
      static_cast<std::int64_t>(blockIdx.y) * kCodeWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t column = group * kCodeGroup;
  if (to.store == nullptr || column >= width) return;  // whole warps
  float v[2];
  bool inside[2];
  float low = __int_as_float(0x7f800000), high = -low, zero = 0.0f;
  FLEXCORE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const std::int64_t at = column + lane + i * kWarpSize;
    inside[i] = at < width;
    if (!inside[i]) continue;
    float one[1];
    x.load<1>(blockIdx.x, at, one);
    v[i] = one[0];
    low = fminf(low, v[i]), high = fmaxf(high, v[i]), zero += v[i] * 0.0f;
  }
  low = -warp_max(-low), high = warp_max(high), zero = warp_sum(zero);
  const unsigned minimum = low < 0.0f ? bf16_enlarged(low) : __float_as_uint(low) >> 16;
  const float base = bf16_widened(minimum);
  const unsigned step = zero == zero ? bf16_enlarged((high - base) * (1.0f / 255.0f)) : 0x7fc0u;
  const float size = bf16_widened(step), inverse = size > 0.0f ? 1.0f / size : 0.0f;
  auto* row = reinterpret_cast<unsigned char*>(to.store) + offset * to.length + to.depth * row_bytes;
  FLEXCORE_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (!inside[i]) continue;
    float scaled = (v[i] - base) * inverse + 0.5f;
    scaled = scaled < 255.0f ? scaled : 255.0f;
    scaled = scaled > 0.0f ? scaled : 0.0f;
    row[column + lane + i * kWarpSize] = static_cast<unsigned char>(static_cast<int>(scaled));
  }
  if (lane != 0) return;
  unsigned char* pair = row + width + group * 4;
  pair[0] = static_cast<unsigned char>(minimum), pair[1] = static_cast<unsigned char>(minimum >> 8);
  pair[2] = static_cast<unsigned char>(step), pair[3] = static_cast<unsigned char>(step >> 8);
}

/// y = minimum + code * step.
struct LoadCodes {
  const unsigned char* x;
  std::int64_t stride, width;
  Rows y;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    const unsigned char* codes = x + row * stride;
    const unsigned char* pair = codes + width + column / kCodeGroup * 4;
    const float base = bf16_widened(pair[0] | static_cast<unsigned>(pair[1]) << 8);
    const float step = bf16_widened(pair[2] | static_cast<unsigned>(pair[3]) << 8);
    const auto pack = load_pack<unsigned char, N>(codes + column);
    float v[N];
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) v[i] = base + step * static_cast<float>(pack.at[i]);
    y.store<N>(row, column, v);
  }
};

}  // namespace flexcore::cuda
