#pragma once

#include <cstdint>

#include "core/bfloat16.h"

// Vectors of the instruction set that this file is compiled for. Only the GEMM kernels include it.
namespace flexcore::cpu::FLEXCORE_ISA {

/// Output features of one panel of a packed weight: a cache line of floats, or of bfloat16 pairs.
inline constexpr int kPanel = 16;

// kRows x (kPanels panels) is the largest register tile: 24, 12 and 8 accumulators of 32, 16 and 16 registers.
#if defined(FLEXCORE_ISA_avx512)
inline constexpr int kLanes = 16, kRows = 12, kPanels = 2;
#elif defined(FLEXCORE_ISA_avx2)
inline constexpr int kLanes = 8, kRows = 6, kPanels = 1;
#else
inline constexpr int kLanes = 4, kRows = 2, kPanels = 1;
#endif
inline constexpr int kPanelVecs = kPanel / kLanes;  // vectors in one row of a panel

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef float LooseVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

FLEXCORE_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
FLEXCORE_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }

}  // namespace flexcore::cpu::FLEXCORE_ISA
