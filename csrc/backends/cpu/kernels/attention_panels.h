#pragma once

#include "backends/cpu/kernels/attention_tile.h"

// Panels of keys and values gathered from pages.
namespace flexcore::cpu::FLEXCORE_ISA::attention {

FLEXCORE_INLINE void* head_row(const HeadRows& rows, std::int64_t token, std::int64_t head) {
  const std::int64_t offset = token * rows.token_stride + head * rows.head_stride;
  return rows.bf16 ? static_cast<void*>(static_cast<bfloat16*>(rows.data) + offset)
                   : static_cast<void*>(static_cast<float*>(rows.data) + offset);
}

/// Element offset, in the pages, of a position of a kv head.
FLEXCORE_INLINE std::int64_t page_offset(const AttentionProblem& p, const AttentionTile& t, std::int64_t position) {
  const std::int64_t page = t.block_table[position / p.block_size];
  return page * p.page_stride + (t.kv_head * p.block_size + position % p.block_size) * p.head_dim;
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

/// Asks for the block at `first` ahead of its use: pages lie anywhere, and each holds too few bytes of a head for the
/// hardware to foresee.
FLEXCORE_INLINE void prefetch_keys(const AttentionProblem& p, const AttentionTile& t, std::int64_t first,
                                   std::int64_t end) {
  const std::int64_t width = p.bf16_pages ? 2 : 4, stop = least(first + kKeyBlock, end);
  for (std::int64_t i = first; i < stop;) {
    const std::int64_t run = least(stop - i, p.block_size - i % p.block_size);
    const std::int64_t begin = page_offset(p, t, i) * width, bytes = run * p.head_dim * width;
    for (std::int64_t b = begin; b < begin + bytes; b += 64) {
      __builtin_prefetch(static_cast<const char*>(p.keys) + b);
      __builtin_prefetch(static_cast<const char*>(p.values) + b);
    }
    i += run;
  }
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
  for (std::int64_t i = 0; i < keys.columns; i += kLanes) {
    const char* rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = static_cast<const char*>(page_row(pages, bf16, keys.offset[i + r]));
    float* out = panel + i;
    VecU column[4];
    if (bf16) {
      for (std::int64_t d = 0; d < dim; d += 8) {
        load_columns(rows, d * 2, column);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          store(out + (d + 2 * c) * kKeyBlock, __builtin_bit_cast(Vec, column[c] << 16));
          store(out + (d + 2 * c + 1) * kKeyBlock, __builtin_bit_cast(Vec, column[c] & 0xffff0000u));
        }
      }
    } else {
      for (std::int64_t d = 0; d < dim; d += 4) {
        load_columns(rows, d * 4, column);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) store(out + (d + c) * kKeyBlock, __builtin_bit_cast(Vec, column[c]));
      }
    }
  }
}

/// o[r] += sum over keys of prob[r, k] value[k], with the values read from their pages: for so few rows, a panel costs
/// more than it saves. The order is tile_product's. head_dim: a multiple of kLanes.
template <int Rows, int Vecs, bool Bf16>
FLEXCORE_INLINE void multiply_pages(const void* values, const BlockKeys& keys, std::int64_t num_keys, const float* prob,
                                    std::int64_t dim, std::int64_t d, float* o) {
  for (; d + Vecs * kLanes <= dim; d += Vecs * kLanes) {
    Vec acc[Rows][Vecs];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) acc[r][v] = load(o + r * dim + d + v * kLanes);
    }
    for (std::int64_t k = 0; k < num_keys; ++k) {
      const std::int64_t at = keys.offset[k] + d;
      Vec bv[Vecs];
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v)
        bv[v] = Bf16 ? load_bf16(static_cast<const bfloat16*>(values) + at + v * kLanes)
                     : load(static_cast<const float*>(values) + at + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const float x = prob[r * kKeyBlock + k];
#pragma GCC unroll 16
        for (int v = 0; v < Vecs; ++v) acc[r][v] += x * bv[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < Vecs; ++v) store(o + r * dim + d + v * kLanes, acc[r][v]);
    }
  }
  if constexpr (Vecs > 1) {
    if (d < dim) multiply_pages<Rows, Vecs / 2, Bf16>(values, keys, num_keys, prob, dim, d, o);
  }
}

template <bool Bf16>
__attribute__((noinline)) void page_product(const void* values, const BlockKeys& keys, std::int64_t num_keys,
                                            const float* prob, std::int64_t rows, std::int64_t dim, float* o) {
  std::int64_t r = 0;
  for (; rows - r >= 3; r += 3)
    multiply_pages<3, 4, Bf16>(values, keys, num_keys, prob + r * kKeyBlock, dim, 0, o + r * dim);
  for (; r < rows; ++r) multiply_pages<1, 8, Bf16>(values, keys, num_keys, prob + r * kKeyBlock, dim, 0, o + r * dim);
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

/// Where the strip of tokens that begins at `token` ends. On the diagonal, strips are short, and multiply only the keys
/// that their last token sees.
FLEXCORE_INLINE std::int64_t strip_end(const AttentionTile& t, std::int64_t first, std::int64_t token,
                                       std::int64_t end) {
  constexpr std::int64_t kDiagonalTokens = 16;
  return t.position + token + 1 < first + kKeyBlock ? least(token + kDiagonalTokens, end) : end;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA::attention
