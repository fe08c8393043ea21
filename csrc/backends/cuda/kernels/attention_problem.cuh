#pragma once

#include "backends/cuda/kernels/rows.cuh"

// What attention's kernels share: operands, work items, and how rows and keys are found. A kv head's `rows` are
// (token, query head of its group), token-major, so that the heads of a group share every key and value that is read.

namespace flexcore::cuda {

inline constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

/// [num_tokens, heads, head_dim] float or bf16, last dimension dense; strides in elements.
struct HeadRows {
  Rows tokens;
  std::int64_t head_stride = 0;
  bool packs = false;  // kPackElements from any multiple of them are aligned

  __device__ __forceinline__ std::int64_t at(std::int64_t token, int head) const {
    return token * tokens.stride + head * head_stride;
  }
  /// Elements [d, d + N) of a head, N a power of two up to kPackElements.
  template <int N>
  __device__ __forceinline__ void load(std::int64_t token, int head, int d, float (&x)[N]) const {
    if (packs) {
      tokens.load<N>(token, head * head_stride + d, x);
      return;
    }
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) {
      float one[1];
      tokens.load<1>(token, head * head_stride + d + i, one);
      x[i] = one[0];
    }
  }
  template <int N>
  __device__ __forceinline__ void store(std::int64_t token, int head, int d, const float (&x)[N]) const {
    if (packs) {
      tokens.store<N>(token, head * head_stride + d, x);
      return;
    }
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) {
      const float one[1] = {x[i]};
      tokens.store<1>(token, head * head_stride + d + i, one);
    }
  }
};

/// One block's work for every kv head (blockIdx.y): some rows of a span against keys [key_begin, key_end).
struct AttentionItem {
  int span_row;             // row of the batch where the span begins
  int position;             // of that token in its sequence
  int table;                // where the span's pages begin in the block tables
  int row_begin, num_rows;  // rows of the span; no rows: nothing to do
  int tile_rows;            // rows that the kernel computes for them, a multiple of 16
  int key_begin, key_end;
  int partial;  // -1: these are all keys; else the first of its rows in the partial results
};

/// Up to kMergeRows rows whose keys were split: partial results `split_rows` apart.
struct AttentionMerge {
  int span_row, row_begin, num_rows;
  int partial, num_splits, split_rows;
};
inline constexpr int kMergeRows = 8;

/// One block's work for every kv head in backward: keys [key_begin, key_end) of a window, whose gradients it owns.
struct AttentionKeyItem {
  int span_row, num_tokens, position, table;  // of the window, as in AttentionItem
  int window;                                 // index of its accumulators
  int key_begin, key_end;
};

/// Accumulators of a window's sequence: [sequence_length, num_kv_heads, head_dim].
struct AttentionSums {
  float *grad_k, *grad_v;
};

/// A token of the batch and where its keys and values go: page * page_rows + slot in the page;
/// row -1: none.
struct KvSlot {
  std::int64_t token, row;
};

/// What all blocks of a call share.
struct AttentionProblem {
  Rows keys, values;           // rows of head_dim; a page is [num_kv_heads, block_size] of them
  std::int64_t page_rows = 0;  // from one page to the next
  bool page_packs = false;
  const std::int32_t* block_tables = nullptr;  // of all spans, one after the other
  int num_kv_heads = 0, group = 1, head_dim = 0, block_size = 0;
  int window = 0;  // a row at position p sees the keys after p - window, up to p; INT_MAX: all
  float scale = 1.0f;
  HeadRows q, y;
  float* lse = nullptr;  // [num_tokens, num_heads]; forward: may be null
  std::int64_t lse_stride = 0;

  /// Row of keys and values that holds a key.
  __device__ __forceinline__ std::int64_t page_row(int table, int key, int kv_head) const {
    const unsigned block = static_cast<unsigned>(key) / static_cast<unsigned>(block_size);
    const std::int64_t page = block_tables[table + static_cast<int>(block)];
    return page * page_rows + (kv_head * block_size + key - static_cast<int>(block) * block_size);
  }
  __device__ __forceinline__ bool sees(int position, int key) const {
    return key <= position && key > position - window;
  }
};

/// Backward's further operands.
struct AttentionGradients {
  HeadRows grad_y, grad_q, grad_k_rows, grad_v_rows;
  const float* delta;  // [num_tokens, num_heads]: sum over head_dim of grad_y * y
  const AttentionSums* sums;
};

/// Results of one split of the keys. Row i of kv head h is at i * num_kv_heads + h.
struct AttentionPartials {
  float* sums;    // [rows, num_kv_heads, head_dim]
  float2* stats;  // [rows, num_kv_heads]: maximum of the scores in bits (base 2), sum of 2^(score - maximum)
};

/// A row of a span: where it is in the batch.
struct RowPlace {
  int token, head, position;
};
/// Of row `row` of the span, token-major.
__device__ __forceinline__ RowPlace place_of(const AttentionProblem& p, int span_row, int position, int kv_head,
                                             int row) {
  const int token = static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(p.group));
  return {span_row + token, kv_head * p.group + row - token * p.group, position + token};
}

/// Rows of a window that see any key of an item.
struct RowRange {
  int begin, end;
};
__device__ __forceinline__ RowRange rows_that_see(const AttentionProblem& p, const AttentionKeyItem& item) {
  const std::int64_t after = static_cast<std::int64_t>(item.key_end) - 1 + p.window - item.position;  // tokens
  const int end = after < item.num_tokens ? static_cast<int>(after) : item.num_tokens;
  const int begin = item.key_begin > item.position ? item.key_begin - item.position : 0;
  return {begin * p.group, end * p.group};
}

/// Adds a key's gradients at N dimensions, grad_k before its scale, to its sequence's sums; those of the window's own
/// tokens are final and go to their rows as well.
template <int N>
__device__ __forceinline__ void add_to_sums(const AttentionProblem& p, const AttentionGradients& g,
                                            const AttentionKeyItem& item, const AttentionSums& sums, int kv_head,
                                            int key, int d, const float (&grad_k)[N], const float (&grad_v)[N]) {
  const std::int64_t at = (static_cast<std::int64_t>(key) * p.num_kv_heads + kv_head) * p.head_dim + d;
  float k[N], v[N];
  FLEXCORE_UNROLL
  for (int i = 0; i < N; ++i) {
    k[i] = sums.grad_k[at + i] + grad_k[i] * p.scale;
    v[i] = sums.grad_v[at + i] + grad_v[i];
  }
  FLEXCORE_UNROLL
  for (int i = 0; i < N; ++i) sums.grad_k[at + i] = k[i], sums.grad_v[at + i] = v[i];
  if (key < item.position) return;
  const int token = item.span_row + key - item.position;
  g.grad_k_rows.store(token, kv_head, d, k);
  g.grad_v_rows.store(token, kv_head, d, v);
}

}  // namespace flexcore::cuda
