#pragma once

#include "backends/cuda/kernels/attention_problem.cuh"
#include "backends/cuda/kernels/mma.cuh"

// Tiles of bfloat16 rows in shared memory and the tensor cores' fragments of them. A row has D elements, D a multiple
// of 64 and at least head_dim, zeros behind head_dim. Its chunks of 16 bytes are permuted by the row's number, so that
// the eight rows of a matrix are read from different banks.

namespace flexcore::cuda {

template <int D>
__device__ __forceinline__ unsigned char* chunk_at(unsigned char* tile, int row, int chunk) {
  return tile + row * (D * 2) + ((chunk ^ (row & 7)) << 4);
}
/// A warp starts to copy kRows rows to [first_row, first_row + kRows) of a tile; lane i < kRows brings where row i
/// begins in `data`, negative for a row of zeros.
template <int D, int kRows>
__device__ __forceinline__ void copy_rows(unsigned char* tile, int first_row, const void* data, std::int64_t begin,
                                          int head_dim) {
  constexpr int kChunks = D / 8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  FLEXCORE_UNROLL_2  // addresses of all passes at once would crowd out sums
      for (int pass = 0; pass < kRows * kChunks / kWarpSize; ++pass) {
    const int row = (pass * kWarpSize + lane) / kChunks, chunk = (pass * kWarpSize + lane) % kChunks;
    const std::int64_t from = __shfl_sync(kAllLanes, begin, row);
    const bool valid = from >= 0 && chunk * 8 < head_dim;
    cp_async16(chunk_at<D>(tile, first_row + row, chunk),
               static_cast<const bf16*>(data) + (valid ? from + chunk * 8 : 0), valid);
  }
}

/// Address of the lane's row, a multiple of eight and lane % 8 in a tile, at chunk 2 step + odd: what depends on the
/// lane alone is computed once, each step costs one exclusive or.
template <int D>
__device__ __forceinline__ const unsigned char* matrix_row(const unsigned char* tile, int row, int step, int odd) {
  const int at = row * (D * 2) + ((static_cast<int>(threadIdx.x) % 8 ^ odd) << 4);
  return tile + (at ^ (step % 4 << 5)) + step / 4 * 128;
}

/// Left operand: rows [row, row + 16) of a tile, elements [16 step, 16 step + 16).
template <int D>
__device__ __forceinline__ void load_left(unsigned (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  load_matrices(a, matrix_row<D>(tile, row + lane % 16, step, lane / 16));
}
/// Right operand for products with rows [row, row + 16) of a tile, elements [16 step, 16 step + 16): {b[0], b[1]} gives
/// the first eight columns, {b[2], b[3]} the others.
template <int D>
__device__ __forceinline__ void load_right(unsigned (&b)[4], const unsigned char* tile, int row, int step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  load_matrices(b, matrix_row<D>(tile, row + lane / 16 * 8 + lane % 8, step, lane / 8 % 2));
}
/// Right operand for sums over rows [row, row + 16) of a tile; columns are elements [16 part, 16 part + 16).
template <int D>
__device__ __forceinline__ void load_right_transposed(unsigned (&b)[4], const unsigned char* tile, int row, int part) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  load_matrices_transposed(b, matrix_row<D>(tile, row + lane % 16, part, lane / 16));
}

/// sums [16, W] += rows [row, row + 16) of `left` times rows [first, first + W) of `right`.
template <int D, int W>
__device__ __forceinline__ void multiply_rows(float (&sums)[W / 8][4], const unsigned char* left, int row,
                                              const unsigned char* right, int first) {
  FLEXCORE_UNROLL
  for (int step = 0; step < D / 16; ++step) {
    unsigned a[4];
    load_left<D>(a, left, row, step);
    FLEXCORE_UNROLL
    for (int n = 0; n < W / 16; ++n) {
      unsigned b[4];
      load_right<D>(b, right, first + 16 * n, step);
      mma_bf16(sums[2 * n], a, b[0], b[1]);
      mma_bf16(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// sums [16, Dims] += weights [16, W], rounded to bfloat16, times elements [16 part, 16 part + Dims) of rows
/// [first, first + W) of a tile. A product's result is laid out as the left operand of the next.
template <int D, int W, int Dims>
__device__ __forceinline__ void multiply_weights(float (&sums)[Dims / 8][4], const float (&weights)[W / 8][4],
                                                 const unsigned char* tile, int first, int part = 0) {
  FLEXCORE_UNROLL
  for (int k = 0; k < W / 16; ++k) {
    const float (&x)[4] = weights[2 * k];
    const float (&y)[4] = weights[2 * k + 1];
    const unsigned a[4] = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
    FLEXCORE_UNROLL
    for (int n = 0; n < Dims / 16; ++n) {
      unsigned b[4];
      load_right_transposed<D>(b, tile, first + 16 * k, part + n);
      mma_bf16(sums[2 * n], a, b[0], b[1]);
      mma_bf16(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// A block of Warps warps whose tiles have 16 Warps rows (queries) and as many keys. `tile_rows` of the rows are
/// in use, 16 to a row warp; where that leaves warps over, several share the rows and divide each tile of keys, and
/// their results are added up at the end in a fixed order.
template <int D, int Warps>
struct AttentionBlock {
  static constexpr int kThreads = Warps * kWarpSize, kTile = 16 * Warps;
  static constexpr int kTileBytes = kTile * D * 2;
  static constexpr int kSumStride = D + 8;  // floats; eight banks from row to row

  const AttentionProblem& p;
  const AttentionItem item;
  const int kv_head, warp, lane;
  const int row_warps, row_warp, key_warp;
  int first_position, last_position;  // of the warp's rows
  bool has_rows;

  __device__ __forceinline__ AttentionBlock(const AttentionProblem& problem, const AttentionItem& it)
      : p(problem),
        item(it),
        kv_head(static_cast<int>(blockIdx.y)),
        warp(static_cast<int>(threadIdx.x) / kWarpSize),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        row_warps(it.tile_rows / 16),
        row_warp(warp % row_warps),
        key_warp(warp / row_warps) {
    const int last = (16 * row_warp + 16 < item.num_rows ? 16 * row_warp + 16 : item.num_rows) - 1;
    has_rows = 16 * row_warp < item.num_rows;
    first_position = place(16 * row_warp).position;
    last_position = place(last).position;
  }

  /// Of a row of the tile.
  __device__ __forceinline__ RowPlace place(int row) const {
    return place_of(p, item.span_row, item.position, kv_head, item.row_begin + row);
  }
  /// Row of the tile that holds elements [2 half, 2 half + 2) of the thread's fragments.
  __device__ __forceinline__ int row_of(int half) const { return 16 * row_warp + lane / 4 + 8 * half; }

  /// Starts to copy the tile's rows of x.
  __device__ __forceinline__ void copy_queries(unsigned char* tile, const HeadRows& x) const {
    if (16 * warp >= item.tile_rows) return;
    const int row = 16 * warp + lane % 16;
    std::int64_t begin = -1;
    if (row < item.num_rows) {
      const RowPlace at = place(row);
      begin = x.at(at.token, at.head);
    }
    copy_rows<D, 16>(tile, 16 * warp, x.tokens.data, begin, p.head_dim);
  }

  /// Where the key that this lane looks after in key tile `tile` is; negative where the item does not have it.
  __device__ __forceinline__ std::int64_t find_key(int tile) const {
    const int key = tile * kTile + 16 * warp + lane % 16;
    return key >= item.key_begin && key < item.key_end ? p.page_row(item.table, key, kv_head) * p.head_dim : -1;
  }
  /// Starts to copy a tile of keys and values; `begin` from find_key.
  __device__ __forceinline__ void copy_keys(unsigned char* stage, std::int64_t begin) const {
    copy_rows<D, 16>(stage, 16 * warp, p.keys.data, begin, p.head_dim);
    copy_rows<D, 16>(stage + kTileBytes, 16 * warp, p.values.data, begin, p.head_dim);
  }

  /// step(keys tile, values tile, its first key) for all key tiles of the item, each loaded while the one before is
  /// computed. `stages`: two stages of two tiles; free again afterwards.
  template <class Step>
  __device__ __forceinline__ void over_keys(unsigned char* stages, Step&& step) const {
    const int first = item.key_begin / kTile, last = (item.key_end - 1) / kTile;
    copy_keys(stages, find_key(first));
    cp_async_commit();
    std::int64_t next = first < last ? find_key(first + 1) : -1;
    for (int tile = first; tile <= last; ++tile) {
      unsigned char* stage = stages + (tile - first) % 2 * (2 * kTileBytes);
      if (tile < last) {
        copy_keys(stages + (tile + 1 - first) % 2 * (2 * kTileBytes), next);
        next = tile + 1 < last ? find_key(tile + 2) : -1;
      }
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      step(stage, stage + kTileBytes, tile * kTile);
      __syncthreads();
    }
  }

  /// Whether any of the warp's rows sees any of keys [key, key + width), and whether all see all.
  __device__ __forceinline__ bool any_seen(int key, int width) const {
    return has_rows && key <= last_position && key + width - 1 > first_position - p.window && key < item.key_end &&
           key + width > item.key_begin;
  }
  __device__ __forceinline__ bool all_seen(int key, int width) const {
    return key + width - 1 <= first_position && key > last_position - p.window;
  }

  /// Leaves the warp's sums in rows of kSumStride floats: row 16 warp + i, which belongs to row `tile_rows` times a key
  /// warp further on.
  __device__ __forceinline__ void leave_sums(float* rows, const float (&sums)[D / 8][4]) const {
    FLEXCORE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float* row = rows + (16 * warp + lane / 4 + 8 * half) * kSumStride + lane % 4 * 2;
      FLEXCORE_UNROLL
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(row + 8 * n) = make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
    }
  }
};

}  // namespace flexcore::cuda
