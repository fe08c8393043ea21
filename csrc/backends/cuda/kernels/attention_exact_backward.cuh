#pragma once

#include "backends/cuda/kernels/attention_exact.cuh"

// Backward in float32. Two passes, as on tensor cores (attention_backward.cuh): a block owns the gradients of some keys
// and runs over the rows that see them, then a block owns the gradients of some rows and runs over their keys.

namespace flexcore::cuda {

/// Two tiles of own rows, two of the rows or keys that pass by, weights of both products. D = 128: 76 KiB; 256: 139
/// KiB.
template <int D>
struct ExactBackwardShape {
  static constexpr int kRows = 2;  // own rows or keys of a thread
  static constexpr int kTile = 16 * kRows;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;
  static constexpr int kTileFloats = kTile * kExactStride<D>;
  static constexpr int kSharedBytes = static_cast<int>(sizeof(float)) * (4 * kTileFloats + 2 * kTile * kExactWeights);
  static_assert(kTile == kExactKeys && kSharedBytes <= static_cast<int>(kMostShared));
};

template <int D>
struct ExactBackwardTiles {
  using Shape = ExactBackwardShape<D>;
  float *own, *own_grad, *other, *other_grad, *weights, *grad_weights;
  __device__ __forceinline__ explicit ExactBackwardTiles(float* shared)
      : own(shared),
        own_grad(own + Shape::kTileFloats),
        other(own_grad + Shape::kTileFloats),
        other_grad(other + Shape::kTileFloats),
        weights(other_grad + Shape::kTileFloats),
        grad_weights(weights + Shape::kTile * kExactWeights) {}
};

/// Fills tiles with queries and their output gradients: rows [first, end) of a span.
template <int D>
__device__ __forceinline__ void fill_queries(const AttentionProblem& p, const HeadRows& grad_y, int span_row,
                                             int kv_head, int first, int end, float* queries, float* grads) {
  fill_rows<D, ExactBackwardShape<D>::kTile>(queries, grads, p.head_dim, [&](int i, int d, auto& x, auto& y) {
    if (first + i >= end) return;
    const RowPlace at = place_of(p, span_row, 0, kv_head, first + i);
    p.q.load(at.token, at.head, d, x);
    grad_y.load(at.token, at.head, d, y);
  });
}

/// Grid: key items, kv heads. grad_k and grad_v of the item's keys, and the final ones among them to their rows.
template <int D>
__global__ void __launch_bounds__(kExactThreads, ExactBackwardShape<D>::kBlocks)
    exact_attention_grad_kv_kernel(const AttentionProblem p, const AttentionGradients g,
                                   const AttentionKeyItem* items) {
  FLEXCORE_SHARED(shared);
  using Shape = ExactBackwardShape<D>;
  const AttentionKeyItem item = items[blockIdx.x];
  const ExactThread t;
  const ExactBackwardTiles<D> tiles(reinterpret_cast<float*>(shared));
  const int kv_head = static_cast<int>(blockIdx.y), own = t.y * Shape::kRows;
  fill_pages<D>(p, item.table, kv_head, item.key_begin, item.key_begin, item.key_end, tiles.own, tiles.own_grad);

  const RowRange rows = rows_that_see(p, item);
  float grad_k[Shape::kRows][D / 64][4] = {}, grad_v[Shape::kRows][D / 64][4] = {};
  for (int first = rows.begin; first < rows.end; first += Shape::kTile) {
    __syncthreads();
    fill_queries<D>(p, g.grad_y, item.span_row, kv_head, first, rows.end, tiles.other, tiles.other_grad);
    __syncthreads();
    float s[Shape::kRows][2], ds[Shape::kRows][2];
    dot_rows<D, Shape::kRows>(tiles.own + own * kExactStride<D>, tiles.other + t.x * kExactStride<D>, p.head_dim, s);
    dot_rows<D, Shape::kRows>(tiles.own_grad + own * kExactStride<D>, tiles.other_grad + t.x * kExactStride<D>,
                              p.head_dim, ds);
    FLEXCORE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = first + t.x + 16 * j;
      const bool known = row < rows.end;
      const RowPlace at = place_of(p, item.span_row, item.position, kv_head, known ? row : first);
      const float lse = p.lse[at.token * p.lse_stride + at.head];
      const float delta = g.delta[static_cast<std::int64_t>(at.token) * p.num_kv_heads * p.group + at.head];
      FLEXCORE_UNROLL
      for (int i = 0; i < Shape::kRows; ++i) {
        const bool seen = known && p.sees(at.position, item.key_begin + own + i);
        const float weight = seen ? exp2_approx((s[i][j] * p.scale - lse) * kLog2E) : 0.0f;
        tiles.weights[(own + i) * kExactWeights + t.x + 16 * j] = weight;
        tiles.grad_weights[(own + i) * kExactWeights + t.x + 16 * j] = weight * (ds[i][j] - delta);
      }
    }
    __syncwarp();
    add_weighted<D, Shape::kRows>(tiles.weights + own * kExactWeights, tiles.other_grad + 4 * t.x, grad_v);
    add_weighted<D, Shape::kRows>(tiles.grad_weights + own * kExactWeights, tiles.other + 4 * t.x, grad_k);
  }

  const AttentionSums sums = g.sums[item.window];
  FLEXCORE_UNROLL
  for (int i = 0; i < Shape::kRows; ++i) {
    const int key = item.key_begin + own + i;
    if (key >= item.key_end) continue;
    FLEXCORE_UNROLL
    for (int j = 0; j < D / 64; ++j) {
      const int d = 4 * t.x + 64 * j;
      if (d < p.head_dim) add_to_sums(p, g, item, sums, kv_head, key, d, grad_k[i][j], grad_v[i][j]);
    }
  }
}

/// Grid: items, kv heads. grad_q of the item's rows, or a split's part of it.
template <int D>
__global__ void __launch_bounds__(kExactThreads, ExactBackwardShape<D>::kBlocks)
    exact_attention_grad_q_kernel(const AttentionProblem p, const AttentionGradients g, const AttentionItem* items,
                                  float* partials) {
  FLEXCORE_SHARED(shared);
  using Shape = ExactBackwardShape<D>;
  const AttentionItem item = items[blockIdx.x];
  if (item.num_rows == 0) return;
  const ExactThread t;
  const ExactBackwardTiles<D> tiles(reinterpret_cast<float*>(shared));
  const int kv_head = static_cast<int>(blockIdx.y), own = t.y * Shape::kRows;
  fill_queries<D>(p, g.grad_y, item.span_row, kv_head, item.row_begin, item.row_begin + item.num_rows, tiles.own,
                  tiles.own_grad);

  float grad_q[Shape::kRows][D / 64][4] = {}, lse[Shape::kRows], delta[Shape::kRows];
  RowPlace place[Shape::kRows];
  FLEXCORE_UNROLL
  for (int i = 0; i < Shape::kRows; ++i) {
    const int row = own + i < item.num_rows ? own + i : item.num_rows - 1;
    place[i] = place_of(p, item.span_row, item.position, kv_head, item.row_begin + row);
    lse[i] = p.lse[place[i].token * p.lse_stride + place[i].head];
    delta[i] = g.delta[static_cast<std::int64_t>(place[i].token) * p.num_kv_heads * p.group + place[i].head];
  }
  for (int first = item.key_begin / kExactKeys * kExactKeys; first < item.key_end; first += kExactKeys) {
    __syncthreads();
    fill_pages<D>(p, item.table, kv_head, first, item.key_begin, item.key_end, tiles.other, tiles.other_grad);
    __syncthreads();
    float s[Shape::kRows][2], ds[Shape::kRows][2];
    dot_rows<D, Shape::kRows>(tiles.own + own * kExactStride<D>, tiles.other + t.x * kExactStride<D>, p.head_dim, s);
    dot_rows<D, Shape::kRows>(tiles.own_grad + own * kExactStride<D>, tiles.other_grad + t.x * kExactStride<D>,
                              p.head_dim, ds);
    FLEXCORE_UNROLL
    for (int i = 0; i < Shape::kRows; ++i) {
      FLEXCORE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int key = first + t.x + 16 * j;
        const bool seen = key < item.key_end && p.sees(place[i].position, key);
        const float weight = seen ? exp2_approx((s[i][j] * p.scale - lse[i]) * kLog2E) : 0.0f;
        tiles.grad_weights[(own + i) * kExactWeights + t.x + 16 * j] = weight * (ds[i][j] - delta[i]);
      }
    }
    __syncwarp();
    add_weighted<D, Shape::kRows>(tiles.grad_weights + own * kExactWeights, tiles.other + 4 * t.x, grad_q);
  }

  FLEXCORE_UNROLL
  for (int i = 0; i < Shape::kRows; ++i) {
    if (own + i >= item.num_rows) continue;
    FLEXCORE_UNROLL
    for (int j = 0; j < D / 64; ++j) {
      const int d = 4 * t.x + 64 * j;
      if (d >= p.head_dim) continue;
      FLEXCORE_UNROLL
      for (int c = 0; c < 4; ++c) grad_q[i][j][c] *= p.scale;
      if (item.partial >= 0)
        Rows::store_floats(
            partials + (static_cast<std::int64_t>(item.partial + own + i) * p.num_kv_heads + kv_head) * p.head_dim + d,
            grad_q[i][j]);
      else
        g.grad_q.store(place[i].token, place[i].head, d, grad_q[i][j]);
    }
  }
}

}  // namespace flexcore::cuda
