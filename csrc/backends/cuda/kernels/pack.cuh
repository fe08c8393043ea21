#pragma once

#include "backends/cuda/kernels/rows.cuh"

namespace flexcore::cuda {

/// float16 bits as a float; infinity, NaN and subnormals too.
__device__ __forceinline__ float half_to_float(std::uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  // 2^112 moves the exponent's bias from 15 to 127; infinity and NaN get the exponent of all ones.
  const float scaled = __uint_as_float(magnitude << 13) * 5.192296858534828e33f;
  return __uint_as_float(__float_as_uint(scaled) | (magnitude >= 0x7c00u ? 0x7f800000u : 0u) | sign);
}

/// y = x for x of float16.
struct FromHalf {
  const std::uint16_t* x;
  std::int64_t stride;
  Rows y;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    float a[N];
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) a[i] = half_to_float(x[row * stride + column + i]);
    y.store<N>(row, column, a);
  }
};

}  // namespace flexcore::cuda
