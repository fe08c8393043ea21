#pragma once

#include "backends/cpu/kernels/lanes.h"
#include "backends/cpu/kernels/quantized.h"

// Codes of a line of 16 rows as vectors of the floats that they stand for.
namespace flexcore::cpu::FLEXCORE_ISA {

/// Quantiles of the normal distribution, scaled to [-1, 1], zero among them (QLoRA, arXiv 2305.14314, appendix E).
inline constexpr float kNf4Levels[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};

// The register tile whose weights are decoded on the way. Parameters of groups and decoded values take registers of
// accumulators: 16, 8 and 8 are left for those.
#if defined(FLEXCORE_ISA_avx512)
inline constexpr int kRowsDecoded = 8, kPanelsDecoded = 2;
#elif defined(FLEXCORE_ISA_avx2)
inline constexpr int kRowsDecoded = 4, kPanelsDecoded = 1;
#else
inline constexpr int kRowsDecoded = 2, kPanelsDecoded = 1;
#endif

/// kLanes bytes, widened.
FLEXCORE_INLINE VecU widen_bytes(const std::uint8_t* p) {
#if defined(FLEXCORE_ISA_avx512)
  return (VecU)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(FLEXCORE_ISA_avx2)
  return (VecU)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return VecU{p[0], p[1], p[2], p[3]};
#endif
}

/// kNf4Levels[code], codes below 16.
FLEXCORE_INLINE Vec nf4_levels(VecU code) {
#if defined(FLEXCORE_ISA_avx512)
  const Vec table = load(kNf4Levels);
  return __builtin_shuffle(table, (VecI)code);
#elif defined(FLEXCORE_ISA_avx2)
  const Vec low = __builtin_shuffle(load(kNf4Levels), (VecI)code);
  const Vec high = __builtin_shuffle(load(kNf4Levels + 8), (VecI)code);
  return code > 7u ? high : low;
#else
  return Vec{kNf4Levels[code[0]], kNf4Levels[code[1]], kNf4Levels[code[2]], kNf4Levels[code[3]]};
#endif
}

/// v rounded to bfloat16 and widened again: as to_bfloat16, but for NaN, which a finite weight never is.
FLEXCORE_INLINE Vec as_bfloat16(Vec v) {
  const VecU u = __builtin_bit_cast(VecU, v);
  return __builtin_bit_cast(Vec, (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

/// The parameters of one group for kLanes rows of a panel, and what its codes are worth. A code times a bfloat16 scale
/// is exact, so a fused addition of the minimum has the same bits as one of its own.
template <Codes kCodes>
struct Decoder {
  Vec scale, min;

  FLEXCORE_INLINE void load_parameters(const std::uint8_t* group, std::int64_t row) {
    const auto* parameters = reinterpret_cast<const bfloat16*>(group);
    scale = load(parameters + row);
    min = load(parameters + kPanel + row);
  }
  FLEXCORE_INLINE Vec value(VecU code) const { return min + __builtin_convertvector((VecI)code, Vec) * scale; }
  /// Two k of kLanes rows; `line` is the first row's.
  FLEXCORE_INLINE void pair(const std::uint8_t* line, Vec& even, Vec& odd) const {
    if constexpr (kCodes == Codes::kInt8) {
      even = value(widen_bytes(line));
      odd = value(widen_bytes(line + kPanel));
    } else {
      const VecU codes = widen_bytes(line);
      even = value(codes & 15u);
      odd = value(codes >> 4);
    }
  }
};

template <>
struct Decoder<Codes::kNf4> {
  Vec absmax;

  FLEXCORE_INLINE void load_parameters(const std::uint8_t* group, std::int64_t row) {
    absmax = load(reinterpret_cast<const float*>(group) + row);
  }
  FLEXCORE_INLINE void pair(const std::uint8_t* line, Vec& even, Vec& odd) const {
    const VecU codes = widen_bytes(line);
    even = nf4_levels(codes & 15u) * absmax;
    odd = nf4_levels(codes >> 4) * absmax;
  }
};

// quantized_gemm.cpp
void multiply_quantized(const GemmBlock& g, Codes codes, bool rounded);

}  // namespace flexcore::cpu::FLEXCORE_ISA
