#pragma once

#include "backends/cpu/kernels/gemm_simd.h"

// Squares of 32-bit words, transposed in registers.
namespace flexcore::cpu::FLEXCORE_ISA {

inline constexpr int kSquare = kLanes < 8 ? 4 : 8;  // side of the square that is transposed in registers
typedef std::uint32_t Words __attribute__((vector_size(kSquare * 4)));
typedef std::uint32_t LooseWords __attribute__((vector_size(kSquare * 4), aligned(4), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(kSquare * 2)));

FLEXCORE_INLINE Words load_words(const void* p) { return *static_cast<const LooseWords*>(p); }
FLEXCORE_INLINE void store_words(void* p, Words v) { *static_cast<LooseWords*>(p) = v; }

template <class W, int N>
FLEXCORE_INLINE void transpose(W (&r)[N]) {
  if constexpr (N == 4) {
    const W a = __builtin_shuffle(r[0], r[1], W{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], W{2, 6, 3, 7});
    const W c = __builtin_shuffle(r[2], r[3], W{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], W{2, 6, 3, 7});
    r[0] = __builtin_shuffle(a, c, W{0, 1, 4, 5});
    r[1] = __builtin_shuffle(a, c, W{2, 3, 6, 7});
    r[2] = __builtin_shuffle(b, d, W{0, 1, 4, 5});
    r[3] = __builtin_shuffle(b, d, W{2, 3, 6, 7});
  } else {
    W a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
      a[i] = __builtin_shuffle(r[i], r[i + 1], W{0, 8, 1, 9, 4, 12, 5, 13});
      a[i + 1] = __builtin_shuffle(r[i], r[i + 1], W{2, 10, 3, 11, 6, 14, 7, 15});
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = __builtin_shuffle(a[i + j], a[i + j + 2], W{0, 1, 8, 9, 4, 5, 12, 13});
        b[i + 2 * j + 1] = __builtin_shuffle(a[i + j], a[i + j + 2], W{2, 3, 10, 11, 6, 7, 14, 15});
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = __builtin_shuffle(b[i], b[i + 4], W{0, 1, 2, 3, 8, 9, 10, 11});
      r[i + 4] = __builtin_shuffle(b[i], b[i + 4], W{4, 5, 6, 7, 12, 13, 14, 15});
    }
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
