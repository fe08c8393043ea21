#pragma once

#include "backends/cuda/kernels/device.cuh"

namespace flexcore::cuda {

/// Philox4x32-10, the same numbers as core/philox.h. x: the counter, then 128 random bits.
__device__ __forceinline__ void philox(std::uint64_t seed, unsigned (&x)[4]) {
  constexpr unsigned kA = 0xd2511f53u, kB = 0xcd9e8d57u;
  unsigned key[2] = {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)};
  FLEXCORE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned high_a = __umulhi(kA, x[0]), low_a = kA * x[0], high_b = __umulhi(kB, x[2]), low_b = kB * x[2];
    x[0] = high_b ^ x[1] ^ key[0];
    x[1] = low_b;
    x[2] = high_a ^ x[3] ^ key[1];
    x[3] = low_a;
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
}

/// Uniform in [0, 1), 53 bits that depend on (seed, counter) alone.
__device__ __forceinline__ double philox_uniform(std::uint64_t seed, std::uint64_t counter) {
  unsigned x[4] = {static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32), 0, 0};
  philox(seed, x);
  const std::uint64_t bits = std::uint64_t{x[0]} << 32 | x[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace flexcore::cuda
