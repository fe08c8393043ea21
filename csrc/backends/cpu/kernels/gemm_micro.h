#pragma once

#include "backends/cpu/kernels/gemm_simd.h"

namespace flexcore::cpu::FLEXCORE_ISA {

/// Where the operands of one register tile lie, in elements.
struct TileStrides {
  std::int64_t a_row, a_k;    // element (i, k) of a: i * a_row + k * a_k
  std::int64_t b_k, b_panel;  // element (k, j) of b: k * b_k + (j / kPanel) * b_panel + j % kPanel
};

/// Fetches the line that lies as far behind the tile's panels as this one lies in them, for the tile that comes next.
template <int Panels, class T>
FLEXCORE_INLINE void prefetch_line(const T* b, std::int64_t b_panel) {
#pragma GCC unroll 16
  for (int p = 0; p < Panels; ++p) __builtin_prefetch(b + (Panels + p) * b_panel, 0, 2);
}

/// acc[i][j] += a[i, k] * b[k, j] for k ascending: one accumulator an element, so that its bits depend on k's extent
/// alone.
template <int Rows, int Panels, bool Prefetch = false>
FLEXCORE_INLINE void multiply_tile(const float* a, const float* b, TileStrides s, std::int64_t num_k,
                                   Vec (&acc)[Rows][Panels * kPanelVecs]) {
  constexpr int kVecs = Panels * kPanelVecs;
  for (std::int64_t k = 0; k < num_k; ++k) {
    if constexpr (Prefetch) prefetch_line<Panels>(b, s.b_panel);
    Vec bv[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) bv[j] = load(b + (j / kPanelVecs) * s.b_panel + (j % kPanelVecs) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float x = a[i * s.a_row];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * bv[j];
    }
    a += s.a_k;
    b += s.b_k;
  }
}

/// The same over panels of bfloat16 pairs, widened on the way: even k, then odd k. `a` holds floats.
template <int Rows, int Panels>
FLEXCORE_INLINE void multiply_tile_widened(const float* a, std::int64_t a_row, const std::uint32_t* b,
                                           std::int64_t b_panel, std::int64_t num_pairs,
                                           Vec (&acc)[Rows][Panels * kPanelVecs]) {
  constexpr int kVecs = Panels * kPanelVecs;
  for (std::int64_t k = 0; k < num_pairs; ++k) {
    prefetch_line<Panels>(b, b_panel);
    Vec bv[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j)
      bv[j] = (Vec)(load(b + (j / kPanelVecs) * b_panel + (j % kPanelVecs) * kLanes) << 16);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float x = a[i * a_row];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * bv[j];
    }
    // Loaded again: the registers are taken by accumulators.
    asm("" : "+r"(b));
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j)
      bv[j] = (Vec)(load(b + (j / kPanelVecs) * b_panel + (j % kPanelVecs) * kLanes) & 0xffff0000u);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float x = a[i * a_row + 1];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * bv[j];
    }
    a += 2;
    b += kPanel;
  }
}

#if defined(FLEXCORE_ISA_avx512_bf16)
typedef std::uint32_t Pair __attribute__((may_alias));

/// The same with both operands as bfloat16 pairs.
template <int Rows, int Panels>
FLEXCORE_INLINE void multiply_tile_pairs(const Pair* a, std::int64_t a_row, const std::uint32_t* b,
                                         std::int64_t b_panel, std::int64_t num_pairs,
                                         Vec (&acc)[Rows][Panels * kPanelVecs]) {
  constexpr int kVecs = Panels * kPanelVecs;
  for (std::int64_t k = 0; k < num_pairs; ++k) {
    prefetch_line<Panels>(b, b_panel);
    VecU bv[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) bv[j] = load(b + (j / kPanelVecs) * b_panel + (j % kPanelVecs) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const std::uint32_t x = a[i * a_row];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] = dot_pairs(acc[i][j], x, bv[j]);
    }
    ++a;
    b += kPanel;
  }
}
#endif

}  // namespace flexcore::cpu::FLEXCORE_ISA
