#pragma once

#include <cstdint>

#include "core/bfloat16.h"

#if defined(FLEXCORE_ISA_avx512)
#include <immintrin.h>
#endif

// Vectors of the instruction set that this file is compiled for. Only the GEMM kernels include it.
namespace flexcore::cpu::FLEXCORE_ISA {

/// Columns of one panel of b: a cache line of floats, or of bfloat16 pairs.
inline constexpr int kPanel = 16;

// kRows x (kPanels panels) is the largest register tile: 24, 12 and 8 accumulators of 32, 16 and 16 registers. Widening
// bfloat16 takes registers of its own, hence kRowsWidened. FLEXCORE_ISA_avx512 is defined for avx512_bf16 too.
#if defined(FLEXCORE_ISA_avx512)
inline constexpr int kLanes = 16, kRows = 12, kRowsWidened = 12, kPanels = 2;
#elif defined(FLEXCORE_ISA_avx2)
inline constexpr int kLanes = 8, kRows = 6, kRowsWidened = 4, kPanels = 1;
#else
inline constexpr int kLanes = 4, kRows = 2, kRowsWidened = 2, kPanels = 1;
#endif
#if defined(FLEXCORE_ISA_avx512_bf16)
inline constexpr bool kPairs = true;  // bfloat16 is multiplied as it is, two k at a time
#else
inline constexpr bool kPairs = false;  // bfloat16 is widened to float
#endif
inline constexpr int kPanelVecs = kPanel / kLanes;  // vectors in one row of a panel

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef std::uint32_t LooseVecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

FLEXCORE_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
FLEXCORE_INLINE VecU load(const std::uint32_t* p) { return *reinterpret_cast<const LooseVecU*>(p); }
FLEXCORE_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

/// v, rounded on its own: keeps the compiler from fusing a product with a sum in some instantiations of a template and
/// not in others.
FLEXCORE_INLINE Vec unfused(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

#if defined(FLEXCORE_ISA_avx512_bf16)
/// acc + x.even * b.even + x.odd * b.odd in every lane; `x` is one pair for all lanes.
FLEXCORE_INLINE Vec dot_pairs(Vec acc, std::uint32_t x, VecU b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)b);
}
#endif

}  // namespace flexcore::cpu::FLEXCORE_ISA
