#pragma once

#include <utility>

#include "backends/cpu/kernels/attention.h"
#include "backends/cpu/kernels/gemm_simd.h"
#include "backends/cpu/kernels/vec_math.h"

// Building blocks of the attention kernels: shuffles, small GEMMs on tiles, rows in and out.
namespace flexcore::cpu::FLEXCORE_ISA::attention {

typedef std::uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef std::uint16_t LooseHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef std::uint32_t Quad __attribute__((vector_size(16)));
typedef std::uint32_t LooseQuad __attribute__((vector_size(16), aligned(2), may_alias));

inline constexpr float kLog2E = 1.44269504088896f;
inline constexpr float kLn2 = 0.693147180559945f;
inline constexpr int kBlockVecs = kKeyBlock / kLanes;

FLEXCORE_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
FLEXCORE_INLINE std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
FLEXCORE_INLINE std::int64_t pad_dim(std::int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Shuffles, named by the lane that output i takes: < kLanes from a, else from b.
struct UnpackLow {
  static constexpr int at(int i) { return i / 4 * 4 + i % 4 / 2 + (i % 2 ? kLanes : 0); }
};
struct UnpackHigh {
  static constexpr int at(int i) { return UnpackLow::at(i) + 2; }
};
struct PairLow {
  static constexpr int at(int i) { return i / 4 * 4 + i % 2 + (i % 4 / 2 ? kLanes : 0); }
};
struct PairHigh {
  static constexpr int at(int i) { return PairLow::at(i) + 2; }
};
template <int Distance>
struct Swap {
  static constexpr int at(int i) { return i ^ Distance; }
};

template <class Pattern, class V, int... I>
FLEXCORE_INLINE V shuffle_lanes(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, Pattern::at(I)...);
}
template <class Pattern, class V>
FLEXCORE_INLINE V shuffle(V a, V b) {
  return shuffle_lanes<Pattern>(a, b, std::make_integer_sequence<int, kLanes>{});
}

FLEXCORE_INLINE Quad load_quad(const char* p) { return *reinterpret_cast<const LooseQuad*>(p); }

/// A quad of each of the rows i, i + 4, ..., side by side.
template <int Lanes>
FLEXCORE_INLINE auto load_quads(const char* const* rows, std::int64_t offset) {
  const Quad q0 = load_quad(rows[0] + offset);
  if constexpr (Lanes == 4) {
    return q0;
  } else {
    const auto low = __builtin_shufflevector(q0, load_quad(rows[4] + offset), 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (Lanes == 8) {
      return low;
    } else {
      const Quad q2 = load_quad(rows[8] + offset), q3 = load_quad(rows[12] + offset);
      const auto high = __builtin_shufflevector(q2, q3, 0, 1, 2, 3, 4, 5, 6, 7);
      return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }
}

/// Four 32-bit columns of kLanes rows: out[c] holds column c, row r in lane r. Rows are loaded quad by quad into the
/// lanes where they are wanted, which leaves half of a transposition's shuffles.
FLEXCORE_INLINE void load_columns(const char* const (&rows)[kLanes], std::int64_t offset, VecU (&out)[4]) {
  VecU in[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) in[i] = load_quads<kLanes>(rows + i, offset);
  const VecU a = shuffle<UnpackLow>(in[0], in[1]), b = shuffle<UnpackHigh>(in[0], in[1]);
  const VecU c = shuffle<UnpackLow>(in[2], in[3]), d = shuffle<UnpackHigh>(in[2], in[3]);
  out[0] = shuffle<PairLow>(a, c);
  out[1] = shuffle<PairHigh>(a, c);
  out[2] = shuffle<PairLow>(b, d);
  out[3] = shuffle<PairHigh>(b, d);
}

FLEXCORE_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Every lane ends with the result: at each step both partners add the same two numbers.
FLEXCORE_INLINE float sum_lanes(Vec v) {
  if constexpr (kLanes > 8) v += shuffle<Swap<8 % kLanes>>(v, v);
  if constexpr (kLanes > 4) v += shuffle<Swap<4 % kLanes>>(v, v);
  v += shuffle<Swap<2>>(v, v);
  v += shuffle<Swap<1>>(v, v);
  return v[0];
}
FLEXCORE_INLINE float max_lanes(Vec v) {
  if constexpr (kLanes > 8) v = larger(v, shuffle<Swap<8 % kLanes>>(v, v));
  if constexpr (kLanes > 4) v = larger(v, shuffle<Swap<4 % kLanes>>(v, v));
  v = larger(v, shuffle<Swap<2>>(v, v));
  v = larger(v, shuffle<Swap<1>>(v, v));
  return v[0];
}

/// c[i, j] = sum over k of a[i, k] b[k, j], added to c when Accumulate; a's element (i, k) is a[i * a_row + k * a_k].
/// One accumulator an element, k ascending: the bits depend on nothing but the element's own operands.
struct TileProduct {
  const float* a;
  std::int64_t a_row, a_k;
  const float* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc;
  std::int64_t k;
};

template <bool Accumulate, int Rows, int Vecs>
FLEXCORE_INLINE void multiply(const TileProduct& p, std::int64_t i, std::int64_t j) {
  Vec acc[Rows][Vecs];
  float* c = p.c + i * p.ldc + j;
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) acc[r][v] = Accumulate ? load(c + r * p.ldc + v * kLanes) : Vec{};
  }
  const float* a = p.a + i * p.a_row;
  const float* b = p.b + j;
  for (std::int64_t k = 0; k < p.k; ++k) {
    Vec bv[Vecs];
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float x = a[r * p.a_row];
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) acc[r][v] += x * bv[v];
    }
    a += p.a_k;
    b += p.ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < Vecs; ++v) store(c + r * p.ldc + v * kLanes, acc[r][v]);
  }
}

template <bool Accumulate, int Rows, int Vecs>
FLEXCORE_INLINE void multiply_columns(const TileProduct& p, std::int64_t i, std::int64_t j, std::int64_t columns) {
  for (; columns - j >= Vecs * kLanes; j += Vecs * kLanes) multiply<Accumulate, Rows, Vecs>(p, i, j);
  if constexpr (Vecs > 1) {
    if (j < columns) multiply_columns<Accumulate, Rows, Vecs / 2>(p, i, j, columns);
  }
}

/// columns: a multiple of kLanes.
template <bool Accumulate>
__attribute__((noinline)) void tile_product(const TileProduct& p, std::int64_t rows, std::int64_t columns) {
  std::int64_t i = 0;
#if defined(FLEXCORE_ISA_avx512)
  for (; rows - i >= 12; i += 12) multiply_columns<Accumulate, 12, 2>(p, i, 0, columns);
  for (; rows - i >= 6; i += 6) multiply_columns<Accumulate, 6, 4>(p, i, 0, columns);
  for (; rows - i >= 3; i += 3) multiply_columns<Accumulate, 3, 4>(p, i, 0, columns);
  for (; rows - i >= 1; i += 1) multiply_columns<Accumulate, 1, 4>(p, i, 0, columns);
#elif defined(FLEXCORE_ISA_avx2)
  for (; rows - i >= 6; i += 6) multiply_columns<Accumulate, 6, 2>(p, i, 0, columns);
  for (; rows - i >= 3; i += 3) multiply_columns<Accumulate, 3, 4>(p, i, 0, columns);
  for (; rows - i >= 1; i += 1) multiply_columns<Accumulate, 1, 8>(p, i, 0, columns);
#else
  for (; rows - i >= 3; i += 3) multiply_columns<Accumulate, 3, 4>(p, i, 0, columns);
  for (; rows - i >= 1; i += 1) multiply_columns<Accumulate, 1, 8>(p, i, 0, columns);
#endif
}

FLEXCORE_INLINE Vec load_bf16(const bfloat16* p) {
  const Half half = *reinterpret_cast<const LooseHalf*>(p);
  return __builtin_bit_cast(Vec, __builtin_convertvector(half, VecU) << 16);
}

/// out[0, padded) = factor * x[0, dim), zeros behind.
FLEXCORE_INLINE void load_row(const void* x, bool bf16, std::int64_t dim, float factor, float* out) {
  const std::int64_t whole = dim / kLanes * kLanes;
  if (bf16) {
    const auto* row = static_cast<const bfloat16*>(x);
    for (std::int64_t d = 0; d < whole; d += kLanes) store(out + d, factor * load_bf16(row + d));
    for (std::int64_t d = whole; d < dim; ++d) out[d] = factor * to_float(row[d]);
  } else {
    const auto* row = static_cast<const float*>(x);
    for (std::int64_t d = 0; d < whole; d += kLanes) store(out + d, factor * load(row + d));
    for (std::int64_t d = whole; d < dim; ++d) out[d] = factor * row[d];
  }
  for (std::int64_t d = dim; d < pad_dim(dim); ++d) out[d] = 0.0f;
}

/// out[0, dim) = factor * x[0, dim).
FLEXCORE_INLINE void store_row(const float* x, std::int64_t dim, float factor, void* out, bool bf16) {
  if (bf16) {
    auto* row = static_cast<bfloat16*>(out);
    for (std::int64_t d = 0; d < dim; ++d) row[d] = to_bfloat16(factor * x[d]);
  } else {
    auto* row = static_cast<float*>(out);
    for (std::int64_t d = 0; d < dim; ++d) row[d] = factor * x[d];
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA::attention
