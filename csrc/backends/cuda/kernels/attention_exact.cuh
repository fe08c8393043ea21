#pragma once

#include "backends/cuda/kernels/attention_problem.cuh"
#include "backends/cuda/kernels/mma.cuh"

// Attention in float32 for any dtypes and strides: the exact mode, and what the tensor cores' copies cannot take. 256
// threads as 16 x 16: thread (y, x) has some rows of y and, of each tile of kExactKeys keys, keys x and x + 16; of sums
// over keys, dimensions 4 x + 64 i of its rows. Floor: 4 * head_dim FLOP (forward) and 14 * head_dim FLOP (backward,
// scores and their gradients twice) for every pair of row and key, at the rate of float32.

namespace flexcore::cuda {

inline constexpr int kExactThreads = 256, kExactKeys = 32;
inline constexpr int kExactWeights = kExactKeys + 4;  // floats of a row of weights; rows begin in different banks

/// Rows of D floats in shared memory, zeros behind head_dim. Eight rows at one dimension lie in different banks.
template <int D>
inline constexpr int kExactStride = D + 4;

/// Fills rows [0, kRows) of two tiles, of which `second` may be null. source(row, d, x, y): eight elements of each,
/// zeros on entry.
template <int D, int kRows, class Source>
__device__ __forceinline__ void fill_rows(float* first, float* second, int head_dim, Source&& source) {
  for (int i = static_cast<int>(threadIdx.x); i < kRows * (D / kPackElements); i += kExactThreads) {
    const int row = i / (D / kPackElements), d = i % (D / kPackElements) * kPackElements;
    float x[kPackElements] = {}, y[kPackElements] = {};
    if (d < head_dim) source(row, d, x, y);
    Rows::store_floats(first + row * kExactStride<D> + d, x);
    if (second != nullptr) Rows::store_floats(second + row * kExactStride<D> + d, y);
  }
}

/// s[i][j] = a[row i of the thread] . b[row x + 16 j]; `a` at the thread's first row, `b` at row x.
template <int D, int kRows>
__device__ __forceinline__ void dot_rows(const float* a, const float* b, int head_dim, float (&s)[kRows][2]) {
  FLEXCORE_UNROLL
  for (int i = 0; i < kRows; ++i) s[i][0] = s[i][1] = 0.0f;
  for (int d = 0; d < head_dim; d += 4) {
    float y[2][4];
    FLEXCORE_UNROLL
    for (int j = 0; j < 2; ++j) Rows::load_floats(b + j * 16 * kExactStride<D> + d, y[j]);
    FLEXCORE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      float x[4];
      Rows::load_floats(a + i * kExactStride<D> + d, x);
      FLEXCORE_UNROLL
      for (int e = 0; e < 4; ++e) {
        s[i][0] = fmaf(x[e], y[0][e], s[i][0]);
        s[i][1] = fmaf(x[e], y[1][e], s[i][1]);
      }
    }
  }
}

/// sums[i] += sum over k of weights[row i, k] * tile[k], k ascending; `tile` at dimension 4 x.
template <int D, int kRows>
__device__ __forceinline__ void add_weighted(const float* weights, const float* tile, float (&sums)[kRows][D / 64][4]) {
  for (int k = 0; k < kExactKeys; k += 4) {
    float w[kRows][4];
    FLEXCORE_UNROLL
    for (int i = 0; i < kRows; ++i) Rows::load_floats(weights + i * kExactWeights + k, w[i]);
    FLEXCORE_UNROLL
    for (int e = 0; e < 4; ++e) {
      FLEXCORE_UNROLL
      for (int j = 0; j < D / 64; ++j) {
        float v[4];
        Rows::load_floats(tile + (k + e) * kExactStride<D> + 64 * j, v);
        FLEXCORE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          FLEXCORE_UNROLL
          for (int c = 0; c < 4; ++c) sums[i][j][c] = fmaf(w[i][e], v[c], sums[i][j][c]);
        }
      }
    }
  }
}

/// Over the 16 threads of a row.
__device__ __forceinline__ float row_max(float x) {
  FLEXCORE_UNROLL
  for (int distance = 8; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
__device__ __forceinline__ float row_sum(float x) {
  FLEXCORE_UNROLL
  for (int distance = 8; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

/// Fills tiles with keys [first, first + kExactKeys) and their values, zeros outside of [begin, end).
template <int D>
__device__ __forceinline__ void fill_pages(const AttentionProblem& p, int table, int kv_head, int first, int begin,
                                           int end, float* keys, float* values) {
  fill_rows<D, kExactKeys>(keys, values, p.head_dim, [&](int i, int d, auto& x, auto& y) {
    const int key = first + i;
    if (key < begin || key >= end) return;
    const std::int64_t row = p.page_row(table, key, kv_head);
    HeadRows{p.keys, 0, p.page_packs}.load(row, 0, d, x);
    HeadRows{p.values, 0, p.page_packs}.load(row, 0, d, y);
  });
}

/// Where a thread stands in the 16 x 16.
struct ExactThread {
  int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
};

/// Queries, a tile of keys and one of values, weights. D = 128: 76 KiB with 64 rows; 256: 142 KiB.
template <int D>
struct ExactForwardShape {
  static constexpr int kRows = 4;  // of a thread, or one where a tile has 16 rows
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
  static constexpr int kSharedBytes =
      static_cast<int>(sizeof(float)) * ((16 * kRows + 2 * kExactKeys) * kExactStride<D> + 16 * kRows * kExactWeights);
  static_assert(kSharedBytes <= static_cast<int>(kMostShared));
};

template <int D, int kRows>
__device__ __forceinline__ void exact_forward_tile(const AttentionProblem& p, const AttentionItem& item,
                                                   const AttentionPartials& partials, float* shared) {
  const ExactThread t;
  const int kv_head = static_cast<int>(blockIdx.y), first_row = t.y * kRows;
  float* const queries = shared;
  float* const keys = queries + 16 * kRows * kExactStride<D>;
  float* const values = keys + kExactKeys * kExactStride<D>;
  float* const weights = values + kExactKeys * kExactStride<D>;
  const auto place = [&](int row) { return place_of(p, item.span_row, item.position, kv_head, item.row_begin + row); };
  fill_rows<D, 16 * kRows>(queries, nullptr, p.head_dim, [&](int row, int d, auto& x, auto&) {
    if (row >= item.num_rows) return;
    const RowPlace at = place(row);
    p.q.load(at.token, at.head, d, x);
  });

  const float to_bits = p.scale * kLog2E;
  float sums[kRows][D / 64][4] = {}, most[kRows], total[kRows] = {};
  int position[kRows];
  FLEXCORE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    most[i] = minus_infinity();
    position[i] = place(first_row + i).position;
  }
  for (int first = item.key_begin / kExactKeys * kExactKeys; first < item.key_end; first += kExactKeys) {
    __syncthreads();
    fill_pages<D>(p, item.table, kv_head, first, item.key_begin, item.key_end, keys, values);
    __syncthreads();
    float s[kRows][2];
    dot_rows<D, kRows>(queries + first_row * kExactStride<D>, keys + t.x * kExactStride<D>, p.head_dim, s);
    FLEXCORE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FLEXCORE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int key = first + t.x + 16 * j;
        s[i][j] = key < item.key_end && p.sees(position[i], key) ? s[i][j] * to_bits : minus_infinity();
      }
      const float highest = fmaxf(most[i], row_max(fmaxf(s[i][0], s[i][1])));
      const float base = highest == minus_infinity() ? 0.0f : highest, factor = exp2_approx(most[i] - base);
      most[i] = highest;
      total[i] *= factor;
      FLEXCORE_UNROLL
      for (int j = 0; j < 2; ++j) {
        s[i][j] = exp2_approx(s[i][j] - base);
        total[i] += s[i][j];
        weights[(first_row + i) * kExactWeights + t.x + 16 * j] = s[i][j];
      }
      FLEXCORE_UNROLL
      for (int j = 0; j < D / 64; ++j) {
        FLEXCORE_UNROLL
        for (int c = 0; c < 4; ++c) sums[i][j][c] *= factor;
      }
    }
    __syncwarp();  // a row's threads are of one warp
    add_weighted<D, kRows>(weights + first_row * kExactWeights, values + 4 * t.x, sums);
  }

  FLEXCORE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    total[i] = row_sum(total[i]);
    if (first_row + i >= item.num_rows) continue;
    const RowPlace at = place(first_row + i);
    const std::int64_t slot = static_cast<std::int64_t>(item.partial + first_row + i) * p.num_kv_heads + kv_head;
    FLEXCORE_UNROLL
    for (int j = 0; j < D / 64; ++j) {
      const int d = 4 * t.x + 64 * j;
      if (d >= p.head_dim) continue;
      if (item.partial >= 0) {
        Rows::store_floats(partials.sums + slot * p.head_dim + d, sums[i][j]);
        continue;
      }
      FLEXCORE_UNROLL
      for (int c = 0; c < 4; ++c) sums[i][j][c] /= total[i];
      p.y.store(at.token, at.head, d, sums[i][j]);
    }
    if (t.x != 0) continue;
    if (item.partial >= 0)
      partials.stats[slot] = make_float2(most[i], total[i]);
    else if (p.lse != nullptr)
      p.lse[at.token * p.lse_stride + at.head] = (most[i] + log2f(total[i])) * kLn2;
  }
}

/// Grid: items, kv heads.
template <int D>
__global__ void __launch_bounds__(kExactThreads, ExactForwardShape<D>::kBlocks)
    exact_attention_forward_kernel(const AttentionProblem p, const AttentionItem* items,
                                   const AttentionPartials partials) {
  FLEXCORE_SHARED(shared);
  const AttentionItem item = items[blockIdx.x];
  if (item.num_rows == 0) return;
  if (item.tile_rows > 16)
    exact_forward_tile<D, ExactForwardShape<D>::kRows>(p, item, partials, reinterpret_cast<float*>(shared));
  else
    exact_forward_tile<D, 1>(p, item, partials, reinterpret_cast<float*>(shared));
}

}  // namespace flexcore::cuda
