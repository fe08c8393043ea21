#pragma once

#if defined(FLEXCORE_ISA_avx2) || defined(FLEXCORE_ISA_avx512)
#include <immintrin.h>
#endif

#include "backends/cpu/kernels/gemm_simd.h"

// Rows of float or bfloat16 as vectors of float. Every element of a row goes through the same vector instructions, the
// last few through a padded vector, so that its bits do not depend on where the row ends.
namespace flexcore::cpu::FLEXCORE_ISA {

typedef std::int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef std::uint16_t LooseHalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// GCC's own conversion between 16 and 32 bits takes two halves; the instructions take one step. (Masked by nothing: the
// plain AVX-512 form trips GCC's warning on its undefined operand.)
#if defined(FLEXCORE_ISA_avx512)
FLEXCORE_INLINE VecU widen(const bfloat16* p) {
  return (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FLEXCORE_INLINE HalfVec narrow(VecU bits) { return (HalfVec)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits); }
#elif defined(FLEXCORE_ISA_avx2)
FLEXCORE_INLINE VecU widen(const bfloat16* p) {
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FLEXCORE_INLINE HalfVec narrow(VecU bits) {
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (HalfVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
}
#else
FLEXCORE_INLINE VecU widen(const bfloat16* p) {
  return __builtin_convertvector(*reinterpret_cast<const LooseHalfVec*>(p), VecU);
}
FLEXCORE_INLINE HalfVec narrow(VecU bits) { return __builtin_convertvector(bits, HalfVec); }
#endif

FLEXCORE_INLINE Vec load(const bfloat16* p) { return __builtin_bit_cast(Vec, widen(p) << 16); }

/// As to_bfloat16, a vector at a time.
FLEXCORE_INLINE void store(bfloat16* p, Vec v) {
  const VecU u = __builtin_bit_cast(VecU, v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  *reinterpret_cast<LooseHalfVec*>(p) = narrow(v != v ? (u >> 16) | 0x40u : rounded);
}

/// The first `count` elements, zeros after them.
template <class T>
FLEXCORE_INLINE Vec load_part(const T* p, std::int64_t count) {
  alignas(64) float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <class T>
FLEXCORE_INLINE void store_part(T* p, Vec v, std::int64_t count) {
  alignas(64) T lanes[kLanes];
  store(lanes, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

/// A whole vector at column i of a row.
struct Whole {
  std::int64_t i;
  template <class T>
  FLEXCORE_INLINE Vec get(const T* row) const {
    return load(row + i);
  }
  template <class T>
  FLEXCORE_INLINE void put(T* row, Vec v) const {
    store(row + i, v);
  }
};

/// The last `count` elements of a row, fewer than a vector.
struct Part {
  std::int64_t i, count;
  template <class T>
  FLEXCORE_INLINE Vec get(const T* row) const {
    return load_part(row + i, count);
  }
  template <class T>
  FLEXCORE_INLINE void put(T* row, Vec v) const {
    store_part(row + i, v, count);
  }
};

/// f(Whole) or f(Part) over the columns [begin, width).
template <class F>
FLEXCORE_INLINE void sweep(std::int64_t begin, std::int64_t width, F&& f) {
  std::int64_t i = begin;
  for (; i + kLanes <= width; i += kLanes) f(Whole{i});
  if (i < width) f(Part{i, width - i});
}

/// f(0, float{}) and f(1, bfloat16{}): fills tables that are indexed by dtype.
template <class F>
constexpr void each_dtype(F&& f) {
  f(0, float{});
  f(1, bfloat16{});
}

#if defined(FLEXCORE_ISA_avx512)
inline constexpr VecI kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(FLEXCORE_ISA_avx2)
inline constexpr VecI kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7};
#else
inline constexpr VecI kLaneIndex = {0, 1, 2, 3};
#endif

/// Sum of the lanes, halves first.
FLEXCORE_INLINE float reduce_add(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v += __builtin_shuffle(v, kLaneIndex ^ half);
  return v[0];
}

FLEXCORE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

FLEXCORE_INLINE float reduce_max(Vec v) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) v = max(v, __builtin_shuffle(v, kLaneIndex ^ half));
  return v[0];
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
