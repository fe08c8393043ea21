#pragma once

#include "backends/cpu/kernels/gemm_simd.h"

namespace flexcore::cpu::FLEXCORE_ISA {

/// Where the operands of one register tile lie, in elements.
struct TileStrides {
  std::int64_t a_row, a_k;    // element (i, k) of a: i * a_row + k * a_k
  std::int64_t b_k, b_panel;  // element (k, j) of b: k * b_k + (j / kPanel) * b_panel + j % kPanel
};

/// acc[i][j] += a[i, k] * b[k, j] for k ascending: one accumulator an element, so that its bits depend on k's extent
/// alone.
template <int Rows, int Panels>
FLEXCORE_INLINE void multiply_tile(const float* a, const float* b, TileStrides s, std::int64_t num_k,
                                   Vec (&acc)[Rows][Panels * kPanelVecs]) {
  constexpr int kVecs = Panels * kPanelVecs;
  for (std::int64_t k = 0; k < num_k; ++k) {
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

}  // namespace flexcore::cpu::FLEXCORE_ISA
