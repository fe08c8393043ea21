#pragma once

#include "backends/cuda/kernels/attention_tiles.cuh"

// Backward on tensor cores: bfloat16 queries, output gradients and pages; weights and their gradients are rounded to
// bfloat16 for the products, sums are float32. Two passes, so that every sum has one owner and one order: grad_kv
// blocks own keys and run over rows, grad_q blocks own rows and run over keys. Scores and their gradients are computed
// twice, 14 instead of 10 * head_dim FLOP for every pair of row and key; the alternative, a grad_q for every key tile,
// writes and reads 4 * head_dim bytes of float32 for each row and key tile, and takes scratch that grows with context.

namespace flexcore::cuda {

/// grad_kv: four warps of 16 keys. Shared memory: keys and values, two stages of queries, output gradients, lse and
/// delta. D = 64: 16 + 2 * 16.5 KiB; 128: 32 + 2 * 32.5 KiB; 256: 64 + 2 * 32.25 KiB. A block sums kPart dimensions:
/// the registers of a warp do not hold more.
template <int D>
struct GradKvShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize, kKeys = 16 * kWarps;
  static constexpr int kRows = D <= 128 ? 64 : 32;  // of a stage
  static constexpr int kWidth = 32;                 // rows that a warp takes at once
  static constexpr int kPart = D <= 128 ? D : 128, kParts = D / kPart;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;  // a multiprocessor
  static constexpr int kKeyBytes = kKeys * D * 2, kRowBytes = kRows * D * 2;
  static constexpr int kStageBytes = 2 * kRowBytes + 2 * kRows * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = 2 * kKeyBytes + 2 * kStageBytes;
  static_assert(kSharedBytes <= static_cast<int>(kMostShared));
};

template <int D>
struct GradKvBlock {
  using Shape = GradKvShape<D>;
  const AttentionProblem& p;
  const AttentionGradients& g;
  const AttentionKeyItem item;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const RowRange rows;

  __device__ __forceinline__ GradKvBlock(const AttentionProblem& problem, const AttentionGradients& gradients,
                                         const AttentionKeyItem& it)
      : p(problem), g(gradients), item(it), rows(rows_that_see(problem, it)) {}

  __device__ __forceinline__ RowPlace place(int row) const {
    return place_of(p, item.span_row, item.position, kv_head, row);
  }
  __device__ __forceinline__ void copy_keys(unsigned char* keys, unsigned char* values) const {
    const int key = item.key_begin + 16 * warp + lane % 16;
    const std::int64_t begin = key < item.key_end ? p.page_row(item.table, key, kv_head) * p.head_dim : -1;
    copy_rows<D, 16>(keys, 16 * warp, p.keys.data, begin, p.head_dim);
    copy_rows<D, 16>(values, 16 * warp, p.values.data, begin, p.head_dim);
  }
  /// Rows beyond the last are zeros: weight one times a gradient of zero.
  __device__ __forceinline__ void copy_stage(unsigned char* stage, int first) const {
    constexpr int kEach = Shape::kRows / Shape::kWarps;
    const int row = first + kEach * warp + lane % kEach;
    const bool known = row < rows.end;
    const RowPlace at = place(known ? row : rows.begin);
    copy_rows<D, kEach>(stage, kEach * warp, p.q.tokens.data, known ? p.q.at(at.token, at.head) : -1, p.head_dim);
    copy_rows<D, kEach>(stage + Shape::kRowBytes, kEach * warp, g.grad_y.tokens.data,
                        known ? g.grad_y.at(at.token, at.head) : -1, p.head_dim);
    if (lane < kEach) {
      auto* const lse = reinterpret_cast<float*>(stage + 2 * Shape::kRowBytes) + kEach * warp + lane;
      cp_async4(lse, p.lse + at.token * p.lse_stride + at.head, known);
      cp_async4(lse + Shape::kRows, g.delta + static_cast<std::int64_t>(at.token) * p.num_kv_heads * p.group + at.head,
                known);
    }
  }
};

/// Grid: key items, kv heads, parts of head_dim. Adds to grad_k and grad_v of the item's keys, and copies those of the
/// window's own tokens to their rows. Scores are computed with keys on the left, so that a warp's weights are, without
/// a shuffle, the left operand of the sums over rows.
template <int D>
__global__ void __launch_bounds__(GradKvShape<D>::kThreads, GradKvShape<D>::kBlocks)
    attention_grad_kv_kernel(const AttentionProblem p, const AttentionGradients g, const AttentionKeyItem* items) {
  FLEXCORE_SHARED(shared);
  using Shape = GradKvShape<D>;
  constexpr int kWidth = Shape::kWidth;
  const GradKvBlock<D> block(p, g, items[blockIdx.x]);
  const AttentionKeyItem& item = block.item;
  unsigned char* const keys = shared;
  unsigned char* const values = shared + Shape::kKeyBytes;
  unsigned char* const stages = shared + 2 * Shape::kKeyBytes;
  const int part = static_cast<int>(blockIdx.z) * (Shape::kPart / 16);
  const int key = item.key_begin + 16 * block.warp;  // the warp's first

  block.copy_keys(keys, values);  // arrive with the first rows
  block.copy_stage(stages, block.rows.begin);
  cp_async_commit();
  float grad_k[Shape::kPart / 8][4] = {}, grad_v[Shape::kPart / 8][4] = {};
  for (int first = block.rows.begin, turn = 0; first < block.rows.end; first += Shape::kRows, turn ^= 1) {
    if (first + Shape::kRows < block.rows.end)
      block.copy_stage(stages + (turn ^ 1) * Shape::kStageBytes, first + Shape::kRows);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const unsigned char* const queries = stages + turn * Shape::kStageBytes;
    const unsigned char* const grads = queries + Shape::kRowBytes;
    const auto* const lse = reinterpret_cast<const float*>(grads + Shape::kRowBytes);
    const float* const delta = lse + Shape::kRows;
    for (int row = 0; row < Shape::kRows && first + row < block.rows.end; row += kWidth) {
      const int last_row = first + row + kWidth < block.rows.end ? first + row + kWidth - 1 : block.rows.end - 1;
      const int oldest = block.place(first + row).position, newest = block.place(last_row).position;
      if (key > newest || key + 15 <= oldest - p.window) continue;
      float weights[kWidth / 8][4] = {}, grad_weights[kWidth / 8][4] = {};
      multiply_rows<D, kWidth>(weights, keys, 16 * block.warp, queries, row);
      multiply_rows<D, kWidth>(grad_weights, values, 16 * block.warp, grads, row);
      const bool all_seen = key + 15 <= oldest && key > newest - p.window;
      FLEXCORE_UNROLL
      for (int n = 0; n < kWidth / 8; ++n) {
        const int column = row + 8 * n + block.lane % 4 * 2;
        const float2 base = *reinterpret_cast<const float2*>(lse + column);
        const float2 shift = *reinterpret_cast<const float2*>(delta + column);
        FLEXCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float score = weights[n][i] * p.scale - (i % 2 == 0 ? base.x : base.y);
          float weight = exp2_approx(score * kLog2E);
          if (!all_seen && !p.sees(block.place(first + column + i % 2).position, key + block.lane / 4 + i / 2 * 8))
            weight = 0.0f;
          weights[n][i] = weight;
          grad_weights[n][i] = weight * (grad_weights[n][i] - (i % 2 == 0 ? shift.x : shift.y));
        }
      }
      multiply_weights<D, kWidth, Shape::kPart>(grad_v, weights, grads, row, part);
      multiply_weights<D, kWidth, Shape::kPart>(grad_k, grad_weights, queries, row, part);
    }
    __syncthreads();
  }

  const AttentionSums sums = g.sums[item.window];
  FLEXCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int own = key + block.lane / 4 + 8 * half;
    if (own >= item.key_end) continue;
    FLEXCORE_UNROLL
    for (int n = 0; n < Shape::kPart / 8; ++n) {
      const int d = 16 * part + 8 * n + block.lane % 4 * 2;
      if (d >= p.head_dim) continue;
      const float k[2] = {grad_k[n][2 * half], grad_k[n][2 * half + 1]};
      const float v[2] = {grad_v[n][2 * half], grad_v[n][2 * half + 1]};
      add_to_sums(p, g, item, sums, block.kv_head, own, d, k, v);
    }
  }
}

/// grad_q. Shared memory: queries and output gradients, two stages of keys and values; the stages become the warps'
/// sums. D = 64: 16 + 32 KiB; 128: 32 + 64 KiB; 256, two warps: 32 + 64 KiB.
template <int D>
struct GradQShape {
  static constexpr int kWarps = D <= 128 ? 4 : 2;
  static constexpr int kBlocks = 2;                  // a multiprocessor
  static constexpr int kWidth = D <= 128 ? 32 : 16;  // keys that a warp of a full tile takes at once
  using Block = AttentionBlock<D, kWarps>;
  static constexpr int kSharedBytes = 6 * Block::kTileBytes;
  static_assert(Block::kTile * Block::kSumStride * static_cast<int>(sizeof(float)) <= 4 * Block::kTileBytes);
  static_assert(kSharedBytes <= static_cast<int>(kMostShared));
};

/// Adds the key warps up for every row of the tile and writes grad_q, or a split's part of it. Reads the item again: it
/// would cost the loop registers.
template <class Block>
__device__ __forceinline__ void finish_grad_q(const AttentionProblem& p, const AttentionGradients& g,
                                              const AttentionItem* items, const float* rows, float* partials) {
  const AttentionItem item = items[blockIdx.x];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int packs = p.head_dim / kPackElements, key_warps = Block::kTile / item.tile_rows;
  for (int i = static_cast<int>(threadIdx.x); i < item.num_rows * packs; i += Block::kThreads) {
    const int row = i / packs, d = (i - row * packs) * kPackElements;
    float total[kPackElements] = {};
    for (int w = 0; w < key_warps; ++w) {
      float x[kPackElements];
      Rows::load_floats(rows + (row + w * item.tile_rows) * Block::kSumStride + d, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < kPackElements; ++j) total[j] += x[j] * p.scale;
    }
    const RowPlace at = place_of(p, item.span_row, item.position, kv_head, item.row_begin + row);
    if (item.partial >= 0)
      Rows::store_floats(
          partials + (static_cast<std::int64_t>(item.partial + row) * p.num_kv_heads + kv_head) * p.head_dim + d,
          total);
    else
      g.grad_q.store(at.token, at.head, d, total);
  }
}

/// W: keys that a warp takes at once.
template <int D, int W>
__device__ __forceinline__ void grad_q_tile(const AttentionProblem& p, const AttentionGradients& g,
                                            const AttentionItem* items, float* partials, unsigned char* shared) {
  using Block = typename GradQShape<D>::Block;
  const Block block(p, items[blockIdx.x]);
  const AttentionItem& item = block.item;
  unsigned char* const queries = shared;
  unsigned char* const grads = shared + Block::kTileBytes;
  unsigned char* const stages = shared + 2 * Block::kTileBytes;
  block.copy_queries(queries, p.q);
  block.copy_queries(grads, g.grad_y);

  float sums[D / 8][4] = {}, lse[2], delta[2];
  int position[2];
  FLEXCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = block.row_of(half);
    const RowPlace at = block.place(row < item.num_rows ? row : item.num_rows - 1);
    lse[half] = p.lse[at.token * p.lse_stride + at.head];
    delta[half] = g.delta[static_cast<std::int64_t>(at.token) * p.num_kv_heads * p.group + at.head];
    position[half] = at.position;
  }
  block.over_keys(stages, [&](const unsigned char* keys, const unsigned char* values, int tile_key) {
    for (int first = block.key_warp * item.tile_rows; first < (block.key_warp + 1) * item.tile_rows; first += W) {
      const int key = tile_key + first;
      if (!block.any_seen(key, W)) continue;
      float weights[W / 8][4] = {}, grad_weights[W / 8][4] = {};
      multiply_rows<D, W>(weights, queries, 16 * block.row_warp, keys, first);
      multiply_rows<D, W>(grad_weights, grads, 16 * block.row_warp, values, first);
      FLEXCORE_UNROLL
      for (int n = 0; n < W / 8; ++n) {
        FLEXCORE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float weight = exp2_approx((weights[n][i] * p.scale - lse[i / 2]) * kLog2E);
          const bool seen = p.sees(position[i / 2], key + 8 * n + block.lane % 4 * 2 + i % 2);
          grad_weights[n][i] = seen ? weight * (grad_weights[n][i] - delta[i / 2]) : 0.0f;
        }
      }
      multiply_weights<D, W, D>(sums, grad_weights, keys, first);
    }
  });

  auto* const rows = reinterpret_cast<float*>(stages);
  block.leave_sums(rows, sums);
  __syncthreads();
  finish_grad_q<Block>(p, g, items, rows, partials);
}

/// Grid: items, kv heads.
template <int D>
__global__ void __launch_bounds__(GradQShape<D>::Block::kThreads, GradQShape<D>::kBlocks)
    attention_grad_q_kernel(const AttentionProblem p, const AttentionGradients g, const AttentionItem* items,
                            float* partials) {
  FLEXCORE_SHARED(shared);
  constexpr int kWidth = GradQShape<D>::kWidth;
  if (items[blockIdx.x].num_rows == 0) return;
  if (kWidth == 16 || items[blockIdx.x].tile_rows >= kWidth)
    grad_q_tile<D, kWidth>(p, g, items, partials, shared);
  else
    grad_q_tile<D, 16>(p, g, items, partials, shared);
}

}  // namespace flexcore::cuda
