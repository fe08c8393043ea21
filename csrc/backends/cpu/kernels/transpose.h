#pragma once

#include "backends/cpu/kernels/lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

// One butterfly: swaps the blocks of `Half` lanes that lie off the diagonal of each 2 x 2 block matrix.
template <int Half>
FLEXCORE_INLINE void swap_blocks(Vec (&v)[kLanes]) {
  constexpr VecI kUpper = (kLaneIndex & Half) / Half;  // 1 in lanes of the second block
  constexpr VecI kFirst = kLaneIndex + kUpper * (kLanes - Half);
  constexpr VecI kSecond = kLaneIndex + kUpper * kLanes + (1 - kUpper) * Half;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Half) continue;
    const Vec a = v[i], b = v[i + Half];
    v[i] = __builtin_shuffle(a, b, kFirst);
    v[i + Half] = __builtin_shuffle(a, b, kSecond);
  }
}

/// Square of kLanes x kLanes, in registers.
FLEXCORE_INLINE void transpose_square(Vec (&v)[kLanes]) {
  if constexpr (kLanes > 8) swap_blocks<8>(v);
  if constexpr (kLanes > 4) swap_blocks<4>(v);
  swap_blocks<2>(v);
  swap_blocks<1>(v);
}

/// out[c, r] = in[r, c] for the in [rows, columns]; out's rows are padded with zeros to `out_width`, a multiple of
/// kLanes.
FLEXCORE_INLINE void transpose_rows(const float* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns,
                                    float* out, std::int64_t out_stride, std::int64_t out_width) {
  for (std::int64_t r = 0; r < out_width; r += kLanes) {
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const std::int64_t width = columns - c < kLanes ? columns - c : kLanes;
      Vec v[kLanes];
      if (width == kLanes && rows - r >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load(in + (r + i) * in_stride + c);
      } else {
        for (int i = 0; i < kLanes; ++i) v[i] = r + i < rows ? load_part(in + (r + i) * in_stride + c, width) : Vec{};
      }
      transpose_square(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < width) store(out + (c + i) * out_stride + r, v[i]);
    }
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
