#pragma once

#include <utility>

#include "backends/cpu/kernels/attention.h"
#include "backends/cpu/kernels/gemm_simd.h"
#include "backends/cpu/kernels/vec_math.h"

// Building blocks of the attention kernels: small GEMMs on tiles, and panels of keys and values gathered from pages.
namespace flexcore::cpu::FLEXCORE_ISA::attention {

typedef std::uint16_t Half __attribute__((vector_size(kLanes * 2)));
typedef std::uint16_t LooseHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef std::uint32_t LooseVecU __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

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
template <int Odd>
struct EveryOtherQuad {
  static constexpr int at(int i) {
    constexpr int kHalf = kLanes / 8;  // quads taken from each side
    const int quad = i / 4;
    return quad < kHalf ? (2 * quad + Odd) * 4 + i % 4 : kLanes + (2 * (quad - kHalf) + Odd) * 4 + i % 4;
  }
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

/// Transposes a square of 32-bit elements held in registers.
FLEXCORE_INLINE void transpose(VecU (&r)[kLanes]) {
#pragma GCC unroll 4
  for (int g = 0; g < kLanes; g += 4) {
    const VecU a = shuffle<UnpackLow>(r[g], r[g + 1]), b = shuffle<UnpackHigh>(r[g], r[g + 1]);
    const VecU c = shuffle<UnpackLow>(r[g + 2], r[g + 3]), d = shuffle<UnpackHigh>(r[g + 2], r[g + 3]);
    r[g] = shuffle<PairLow>(a, c);
    r[g + 1] = shuffle<PairHigh>(a, c);
    r[g + 2] = shuffle<PairLow>(b, d);
    r[g + 3] = shuffle<PairHigh>(b, d);
  }
  if constexpr (kLanes == 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const VecU low = shuffle<EveryOtherQuad<0>>(r[j], r[j + 4]);
      r[j + 4] = shuffle<EveryOtherQuad<1>>(r[j], r[j + 4]);
      r[j] = low;
    }
  }
  if constexpr (kLanes == 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const VecU a = shuffle<EveryOtherQuad<0>>(r[j], r[j + 4]), b = shuffle<EveryOtherQuad<1>>(r[j], r[j + 4]);
      const VecU c = shuffle<EveryOtherQuad<0>>(r[j + 8], r[j + 12]),
                 d = shuffle<EveryOtherQuad<1>>(r[j + 8], r[j + 12]);
      r[j] = shuffle<EveryOtherQuad<0>>(a, c);
      r[j + 4] = shuffle<EveryOtherQuad<0>>(b, d);
      r[j + 8] = shuffle<EveryOtherQuad<1>>(a, c);
      r[j + 12] = shuffle<EveryOtherQuad<1>>(b, d);
    }
  }
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

FLEXCORE_INLINE void* head_row(const HeadRows& rows, std::int64_t token, std::int64_t head) {
  const std::int64_t offset = token * rows.token_stride + head * rows.head_stride;
  return rows.bf16 ? static_cast<void*>(static_cast<bfloat16*>(rows.data) + offset)
                   : static_cast<void*>(static_cast<float*>(rows.data) + offset);
}

/// Element offset, in the pages, of a position of a kv head.
FLEXCORE_INLINE std::int64_t page_offset(const AttentionProblem& p, const AttentionTile& t, std::int64_t position) {
  const std::int64_t page = t.block_table[position / p.block_size];
  return ((page * p.num_kv_heads + t.kv_head) * p.block_size + position % p.block_size) * p.head_dim;
}

/// Offsets in the pages of the keys of one block; entries of no key are -1.
struct BlockKeys {
  std::int64_t offset[kKeyBlock];
  std::int64_t first = 0, columns = 0;  // position of key 0; keys, rounded up to whole vectors
};

/// Keys of the block at `first`, up to position `end`.
FLEXCORE_INLINE void find_keys(const AttentionProblem& p, const AttentionTile& t, std::int64_t first, std::int64_t end,
                               BlockKeys& keys) {
  const std::int64_t count = least(kKeyBlock, end - first);
  keys.first = first;
  keys.columns = pad_dim(count);
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t run = least(count - i, p.block_size - (first + i) % p.block_size);
    std::int64_t offset = page_offset(p, t, first + i);
    for (const std::int64_t stop = i + run; i < stop; ++i, offset += p.head_dim) keys.offset[i] = offset;
  }
  for (std::int64_t i = count; i < keys.columns; ++i) keys.offset[i] = -1;
}

alignas(64) inline constexpr float kZeroRow[256] = {};

FLEXCORE_INLINE const void* page_row(const void* pages, bool bf16, std::int64_t offset) {
  if (offset < 0) return kZeroRow;
  return bf16 ? static_cast<const void*>(static_cast<const bfloat16*>(pages) + offset)
              : static_cast<const void*>(static_cast<const float*>(pages) + offset);
}

/// panel [kKeyBlock, padded head_dim]
inline __attribute__((noinline)) void gather_rows(const void* pages, bool bf16, const BlockKeys& keys, std::int64_t dim,
                                                  float* panel) {
  for (std::int64_t i = 0; i < keys.columns; ++i)
    load_row(page_row(pages, bf16, keys.offset[i]), bf16, dim, 1.0f, panel + i * pad_dim(dim));
}

/// panel [head_dim, kKeyBlock]: lanes are keys, so that scores need no sum across lanes.
inline __attribute__((noinline)) void gather_columns(const void* pages, bool bf16, const BlockKeys& keys,
                                                     std::int64_t dim, float* panel) {
  // bfloat16 goes through the transposition in pairs, and is widened behind it.
  const std::int64_t step = bf16 ? 2 * kLanes : kLanes, whole = dim / step * step;
  for (std::int64_t i = 0; i < keys.columns; i += kLanes) {
    const char* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = static_cast<const char*>(page_row(pages, bf16, keys.offset[i + r]));
    for (std::int64_t d = 0; d < whole; d += step) {
      VecU square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = *reinterpret_cast<const LooseVecU*>(rows[r] + d * (bf16 ? 2 : 4));
      transpose(square);
      float* out = panel + d * kKeyBlock + i;
      if (bf16) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          store(out + 2 * r * kKeyBlock, __builtin_bit_cast(Vec, square[r] << 16));
          store(out + (2 * r + 1) * kKeyBlock, __builtin_bit_cast(Vec, square[r] & 0xffff0000u));
        }
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(out + r * kKeyBlock, __builtin_bit_cast(Vec, square[r]));
      }
    }
    for (int r = 0; r < kLanes; ++r) {
      for (std::int64_t d = whole; d < dim; ++d)
        panel[d * kKeyBlock + i + r] =
            bf16 ? to_float(reinterpret_cast<const bfloat16*>(rows[r])[d]) : reinterpret_cast<const float*>(rows[r])[d];
    }
  }
}

/// Keys of the block at `first` that a row at `position` sees: [begin, end), relative to `first`.
struct Visible {
  std::int64_t begin, end;
};
FLEXCORE_INLINE Visible visible_keys(const AttentionProblem& p, std::int64_t position, std::int64_t first) {
  const std::int64_t oldest = p.sliding_window > 0 ? position - p.sliding_window + 1 : 0;
  return {most(oldest - first, 0), least(position + 1 - first, kKeyBlock)};
}

/// s outside of `seen` becomes -inf.
FLEXCORE_INLINE void mask_scores(float* s, Visible seen) {
  for (int i = 0; i < kKeyBlock; ++i) s[i] = i >= seen.begin && i < seen.end ? s[i] : -__builtin_inff();
}

/// Tokens [begin, end) of a tile that see any key of [first, last).
FLEXCORE_INLINE Visible seeing_tokens(const AttentionProblem& p, const AttentionTile& t, std::int64_t first,
                                      std::int64_t last) {
  const std::int64_t begin = most(first - t.position, 0);
  const std::int64_t end = p.sliding_window > 0 ? last + p.sliding_window - 1 - t.position : t.num_tokens;
  return {least(begin, t.num_tokens), most(least(end, t.num_tokens), least(begin, t.num_tokens))};
}

}  // namespace flexcore::cpu::FLEXCORE_ISA::attention
