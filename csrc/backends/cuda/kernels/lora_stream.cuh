#pragma once

#include <cstring>

#include "backends/cuda/kernels/lora_tile.cuh"

// What shrink and expand on tensor cores share: operands go from global memory to registers, without a stop in shared
// memory. The order of k within a product is free as long as both sides agree, so a lane takes neighbours in memory
// where the instruction's own order would have it take pairs: 16-byte loads, and no shuffle.

namespace flexcore::cuda {

/// Two floats as bfloat16, and what that rounds off.
struct SplitPair {
  unsigned high, low;
};
__device__ __forceinline__ SplitPair split_pair(float a, float b) {
  const unsigned high = pack_bf16(a, b);
  return {high, pack_bf16(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u))};
}

/// 16 bytes as four words.
__device__ __forceinline__ void load_words(const void* data, unsigned (&x)[4]) {
#if defined(FLEXCORE_SIMT)
  simt::require_aligned(data, 16, "a load of 16 bytes");
  std::memcpy(x, data, sizeof x);
#else
  const uint4 words = *static_cast<const uint4*>(data);
  x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w;
#endif
}
__device__ __forceinline__ void store_words(void* data, const unsigned (&x)[4]) {
#if defined(FLEXCORE_SIMT)
  simt::require_aligned(data, 16, "a store of 16 bytes");
  std::memcpy(data, x, sizeof x);
#else
  *static_cast<uint4*>(data) = make_uint4(x[0], x[1], x[2], x[3]);
#endif
}

}  // namespace flexcore::cuda
