#pragma once

#include "backends/cuda/kernels/attention_tiles.cuh"

// Forward on tensor cores: bfloat16 queries and pages, float32 scores, statistics and sums. Floor: keys and values of a
// sequence once from memory (decode), 4 * head_dim FLOP for every pair of row and key (prefill).

namespace flexcore::cuda {

/// Shared memory: queries, then two stages of keys and values; the stages become the warps' sums and statistics.
/// D = 64: 16 + 64 KiB, two blocks a multiprocessor; 128: 32 + 128 KiB; 256: 32 + 128 KiB.
template <int D>
struct ForwardShape {
  static constexpr int kWarps = D <= 128 ? 8 : 4;
  static constexpr int kBlocks = D <= 64 ? 2 : 1;    // a multiprocessor
  static constexpr int kWidth = D == 128 ? 64 : 32;  // keys that a warp of a full tile takes at once
  using Block = AttentionBlock<D, kWarps>;
  static constexpr int kSharedBytes = 5 * Block::kTileBytes;
  static constexpr int kSumBytes = Block::kTile * Block::kSumStride * static_cast<int>(sizeof(float));
  static_assert(kSumBytes + Block::kTile * static_cast<int>(sizeof(float2)) <= 4 * Block::kTileBytes);
  static_assert(kSharedBytes <= static_cast<int>(kMostShared));
};

/// The running softmax of a thread's two rows, of which four lanes hold some columns each; `total` is the lane's part.
struct OnlineSoftmax {
  float most[2] = {minus_infinity(), minus_infinity()};
  float total[2] = {0.0f, 0.0f};

  /// Scores become 2^(score - maximum); sums are scaled to the new maximum.
  template <int W, int N>
  __device__ __forceinline__ void update(float (&scores)[W][4], float (&sums)[N][4]) {
    FLEXCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float highest = most[half];
      FLEXCORE_UNROLL
      for (int n = 0; n < W; ++n) highest = fmaxf(highest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const float base = highest == minus_infinity() ? 0.0f : highest;  // a row that has seen nothing yet
      const float factor = exp2_approx(most[half] - base);
      most[half] = highest;
      total[half] *= factor;
      FLEXCORE_UNROLL
      for (int n = 0; n < W; ++n) {
        FLEXCORE_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) total[half] += scores[n][i] = exp2_approx(scores[n][i] - base);
      }
      FLEXCORE_UNROLL
      for (int n = 0; n < N; ++n) sums[n][2 * half] *= factor, sums[n][2 * half + 1] *= factor;
    }
  }
};

/// Adds the key warps up for every row of the tile and writes y and lse, or partial results.
template <class Block>
__device__ __forceinline__ void finish_forward(const Block& block, const float* sums, const float2* stats,
                                               const AttentionPartials& partials) {
  const AttentionProblem& p = block.p;
  const AttentionItem& item = block.item;
  const int packs = p.head_dim / kPackElements, key_warps = Block::kTile / item.tile_rows;
  for (int i = static_cast<int>(threadIdx.x); i < item.num_rows * packs; i += Block::kThreads) {
    const int row = i / packs, d = (i - row * packs) * kPackElements;
    float most = minus_infinity(), total = 0.0f, y[kPackElements] = {};
    for (int w = 0; w < key_warps; ++w) most = fmaxf(most, stats[row + w * item.tile_rows].x);
    const float base = most == minus_infinity() ? 0.0f : most;
    for (int w = 0; w < key_warps; ++w) {
      const int slot = row + w * item.tile_rows;
      const float factor = exp2_approx(stats[slot].x - base);
      total += factor * stats[slot].y;
      float x[kPackElements];
      Rows::load_floats(sums + slot * Block::kSumStride + d, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < kPackElements; ++j) y[j] += factor * x[j];
    }
    if (item.partial >= 0) {
      const std::int64_t at = static_cast<std::int64_t>(item.partial + row) * p.num_kv_heads + block.kv_head;
      Rows::store_floats(partials.sums + at * p.head_dim + d, y);
      if (d == 0) partials.stats[at] = make_float2(most, total);
      continue;
    }
    const float inverse = 1.0f / total;
    FLEXCORE_UNROLL
    for (int j = 0; j < kPackElements; ++j) y[j] *= inverse;
    const RowPlace place = block.place(row);
    p.y.store(place.token, place.head, d, y);
    if (d == 0 && p.lse != nullptr) p.lse[place.token * p.lse_stride + place.head] = (most + log2f(total)) * kLn2;
  }
}

/// W: keys that a warp takes at once; each warp has tile_rows of every tile's keys.
template <int D, int W>
__device__ __forceinline__ void forward_tile(const AttentionProblem& p, const AttentionItem& item,
                                             const AttentionPartials& partials, unsigned char* shared) {
  using Shape = ForwardShape<D>;
  using Block = typename Shape::Block;
  const Block block(p, item);
  unsigned char* const queries = shared;
  unsigned char* const stages = shared + Block::kTileBytes;
  block.copy_queries(queries, p.q);  // arrive with the first keys

  const float to_bits = p.scale * kLog2E;
  float sums[D / 8][4] = {};
  OnlineSoftmax softmax;
  const int position[2] = {block.place(block.row_of(0)).position, block.place(block.row_of(1)).position};
  block.over_keys(stages, [&](const unsigned char* keys, const unsigned char* values, int tile_key) {
    for (int first = block.key_warp * item.tile_rows; first < (block.key_warp + 1) * item.tile_rows; first += W) {
      const int key = tile_key + first;
      if (!block.any_seen(key, W)) continue;
      float scores[W / 8][4] = {};
      multiply_rows<D, W>(scores, queries, 16 * block.row_warp, keys, first);
      FLEXCORE_UNROLL
      for (int n = 0; n < W / 8; ++n) {
        FLEXCORE_UNROLL
        for (int i = 0; i < 4; ++i) scores[n][i] *= to_bits;
      }
      if (!block.all_seen(key, W)) {
        FLEXCORE_UNROLL
        for (int n = 0; n < W / 8; ++n) {
          FLEXCORE_UNROLL
          for (int i = 0; i < 4; ++i)
            if (!p.sees(position[i / 2], key + 8 * n + block.lane % 4 * 2 + i % 2)) scores[n][i] = minus_infinity();
        }
      }
      softmax.update(scores, sums);
      multiply_weights<D, W, D>(sums, scores, values, first);
    }
  });

  auto* const rows = reinterpret_cast<float*>(stages);
  auto* const stats = reinterpret_cast<float2*>(stages + Shape::kSumBytes);
  block.leave_sums(rows, sums);
  FLEXCORE_UNROLL
  for (int half = 0; half < 2; ++half) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if (block.lane % 4 == 0)
      stats[16 * block.warp + block.lane / 4 + 8 * half] = make_float2(softmax.most[half], total);
  }
  __syncthreads();
  finish_forward(block, rows, stats, partials);
}

/// Grid: items, kv heads. Decode rows, chunks and windows are items of one launch: full tiles take 64 keys at once in
/// every warp; with few rows the warps divide the keys.
template <int D>
__global__ void __launch_bounds__(ForwardShape<D>::Block::kThreads, ForwardShape<D>::kBlocks)
    attention_forward_kernel(const AttentionProblem p, const AttentionItem* items, const AttentionPartials partials) {
  FLEXCORE_SHARED(shared);
  const AttentionItem item = items[blockIdx.x];
  if (item.num_rows == 0) return;
  if (item.tile_rows >= ForwardShape<D>::kWidth)
    forward_tile<D, ForwardShape<D>::kWidth>(p, item, partials, shared);
  else
    forward_tile<D, 16>(p, item, partials, shared);
}

}  // namespace flexcore::cuda
