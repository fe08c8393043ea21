#pragma once

#include "backends/cuda/kernels/lora_stream.cuh"

// Shrink: u = x A^T for all members that share x, and du = grad_y B. k = features, which are divided among `splits`
// blocks by their number alone, so that a row's sums do not depend on the batch; each block writes a slab of u, and who
// reads u adds the slabs in their order.

namespace flexcore::cuda {

struct LoraShrinkTask {
  Rows x;              // [.., width]
  std::int64_t width;  // in_features, or out_features for du
  std::int64_t row;    // rows [row, row + rows) of x, one stack
  int rows, stack;
  int splits;
};

struct LoraShrink {
  const LoraShrinkTask* tasks;
  const LoraStack* stacks;
  const LoraPart* parts;
  bool packs;  // every row of every x
};

/// Where the part of a split begins: a multiple of 64 features, or the width.
__device__ __forceinline__ std::int64_t first_feature(const LoraShrinkTask& task, int split) {
  const std::int64_t steps = (task.width + kLoraK - 1) / kLoraK, feature = kLoraK * (steps * split / task.splits);
  return feature < task.width ? feature : task.width;
}

/// Rows of a task, two m16 tiles, and features that a warp takes at once: eight a lane.
inline constexpr int kShrinkRows = 32, kShrinkFeatures = 32;
/// Many warps with few features each: with few rows, what takes time is one load after the other. 64 columns need the
/// registers of fewer.
template <int kTiles>
inline constexpr int kShrinkThreads = kTiles == 2 ? 512 : 384;

/// Eight features of one row as pairs, and of float rows what they round off; zeros beyond `left`.
template <bool is_bf16>
struct ShrinkRow {
  unsigned high[4], low[is_bf16 ? 1 : 4];

  __device__ __forceinline__ void load(const Rows& x, bool packs, std::int64_t row, std::int64_t feature, int left) {
    const std::int64_t at = row * x.stride + feature;
    if constexpr (is_bf16) {
      const bf16* from = static_cast<const bf16*>(x.data) + at;
      if (left >= 8 && packs) {
        load_words(from, high);
      } else {
        FLEXCORE_UNROLL
        for (int i = 0; i < 4; ++i)
          high[i] = (2 * i < left ? from[2 * i].bits : 0u) | (2 * i + 1 < left ? from[2 * i + 1].bits : 0u) << 16;
      }
    } else {
      const float* from = static_cast<const float*>(x.data) + at;
      float e[8];
      if (left >= 8 && packs) {
        Rows::load_floats(from, e);
      } else {
        FLEXCORE_UNROLL
        for (int i = 0; i < 8; ++i) e[i] = i < left ? from[i] : 0.0f;
      }
      FLEXCORE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const SplitPair pair = split_pair(e[2 * i], e[2 * i + 1]);
        high[i] = pair.high, low[i] = pair.low;
      }
    }
  }
  __device__ __forceinline__ void clear() {
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i) high[i] = 0;
    if constexpr (!is_bf16) FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i) low[i] = 0;
  }
};

template <int kTiles>
inline constexpr int kShrinkStride = kTiles * 8 + 8;  // of a row of the warps' sums: no bank conflicts
template <int kTiles>
inline constexpr int kShrinkBytes =
    kLoraN * static_cast<int>(sizeof(LoraColumn)) +
    kShrinkThreads<kTiles> / kWarpSize * kShrinkRows * kShrinkStride<kTiles> * static_cast<int>(sizeof(float));

/// Rows [row, row + rows <= 32) times one stack of at most 8 kTiles columns; the warps divide the features among them.
/// `turned`: the matrix is B, whose ranks are neighbours. Grid: (tasks, most splits).
/// Floor: x once per 64 stacked ranks (2 or 4 bytes an element), A once per 32 rows (4 bytes, from L2 after the first),
/// slabs rows * ranks * 4 * splits bytes; 2 rows ranks width FLOP, times two (bfloat16 rows) or three mma.
template <bool is_bf16, bool turned, int kTiles>
__global__ void __launch_bounds__(kShrinkThreads<kTiles>, 1) lora_shrink_kernel(const LoraShrink args) {
  constexpr int kWarps = kShrinkThreads<kTiles> / kWarpSize, kStride = kShrinkStride<kTiles>;
  FLEXCORE_SHARED(shared);
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  auto* sums = reinterpret_cast<float*>(shared + kLoraN * sizeof(LoraColumn));
  const LoraShrinkTask task = args.tasks[blockIdx.x];
  const int split = static_cast<int>(blockIdx.y);
  if (split >= task.splits) return;
  const LoraStack stack = args.stacks[task.stack];
  spread_columns(stack, args.parts, columns);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, q = lane % 4;
  const std::int64_t end = first_feature(task, split + 1);
  float c[2][kTiles][4] = {};
#if !defined(FLEXCORE_SIMT)
#pragma unroll(kTiles == 2 ? 2 : 1)  // as many loads in flight as there are registers for
#endif
  for (std::int64_t first = first_feature(task, split) + warp * kShrinkFeatures; first < end;
       first += kWarps * kShrinkFeatures) {
    const std::int64_t feature = first + q * 8, beyond = task.width - feature;
    const int left = beyond < 0 ? 0 : beyond < 8 ? static_cast<int>(beyond) : 8;
    ShrinkRow<is_bf16> x[4];
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (g + 8 * i < task.rows && left > 0)
        x[i].load(task.x, args.packs, task.row + g + 8 * i, feature, left);
      else
        x[i].clear();
    }
    FLEXCORE_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      if (8 * t >= stack.columns) continue;
      const LoraColumn& column = columns[8 * t + g];
      float e[8] = {};
      if (column.valid > 0 && left > 0) {
        const float* from = column.matrix + feature * (turned ? column.feature_step : 1);
        if (!turned && stack.packs && left >= 8) {
          Rows::load_floats(from, e);
        } else {
          const std::int64_t step = turned ? column.feature_step : 1;
          FLEXCORE_UNROLL
          for (int i = 0; i < 8; ++i)
            if (i < left) e[i] = from[i * step];
        }
      }
      FLEXCORE_UNROLL
      for (int s = 0; s < 2; ++s) {
        const SplitPair b0 = split_pair(e[4 * s], e[4 * s + 1]), b1 = split_pair(e[4 * s + 2], e[4 * s + 3]);
        FLEXCORE_UNROLL
        for (int m = 0; m < 2; ++m) {
          if (16 * m >= task.rows) continue;
          const auto &top = x[2 * m], &bottom = x[2 * m + 1];
          const unsigned a[4] = {top.high[2 * s], bottom.high[2 * s], top.high[2 * s + 1], bottom.high[2 * s + 1]};
          mma_bf16(c[m][t], a, b0.low, b1.low);
          if constexpr (!is_bf16) {
            const unsigned rest[4] = {top.low[2 * s], bottom.low[2 * s], top.low[2 * s + 1], bottom.low[2 * s + 1]};
            mma_bf16(c[m][t], rest, b0.high, b1.high);
          }
          mma_bf16(c[m][t], a, b0.high, b1.high);
        }
      }
    }
  }

  // The warps' sums, added in their order.
  FLEXCORE_UNROLL
  for (int m = 0; m < 2; ++m) FLEXCORE_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    if (16 * m >= task.rows || 8 * t >= stack.columns) continue;
    FLEXCORE_UNROLL
    for (int half = 0; half < 2; ++half)
      store_pack(sums + (warp * kShrinkRows + 16 * m + 8 * half + g) * kStride + 8 * t + 2 * q,
                 Pack<float, 2>{{c[m][t][2 * half], c[m][t][2 * half + 1]}});
  }
  __syncthreads();
  const int across = stack.columns / 4;
  for (int i = static_cast<int>(threadIdx.x); i < task.rows * across; i += kShrinkThreads<kTiles>) {
    const int row = i / across, at = i % across * 4;
    const LoraColumn& column = columns[at];
    if (column.valid == 0) continue;
    auto sum = load_pack<float, 4>(sums + row * kStride + at);
    FLEXCORE_UNROLL
    for (int w = 1; w < kWarps; ++w) {
      const auto part = load_pack<float, 4>(sums + (w * kShrinkRows + row) * kStride + at);
      FLEXCORE_UNROLL
      for (int j = 0; j < 4; ++j) sum.at[j] += part.at[j];
    }
    // Rows of u are whole quads long; what lies beyond the rank is zero.
    store_pack(column.u_row(task.row + row) + split * column.slab, sum);
  }
}

/// `most_columns`: of a stack.
template <bool is_bf16, bool turned>
void launch_lora_shrink(const LoraShrink& args, int tasks, int splits, int most_columns, cudaStream_t stream) {
  if (tasks == 0) return;
  const bool narrow = most_columns <= 16;
  launch(narrow ? lora_shrink_kernel<is_bf16, turned, 2> : lora_shrink_kernel<is_bf16, turned, 8>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>(splits)),
         dim3(narrow ? kShrinkThreads<2> : kShrinkThreads<8>), narrow ? kShrinkBytes<2> : kShrinkBytes<8>, stream,
         args);
}

/// The same in float32, with FMA: rows [row, row + rows <= 128).
template <bool turned>
__global__ void __launch_bounds__(kLoraThreads, 2) exact_lora_shrink_kernel(const LoraShrink args) {
  using Pipeline = LoraPipeline<LoraMode::kExact, false, turned>;
  using Product = typename Pipeline::Product;
  FLEXCORE_SHARED(shared);
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  unsigned char* const tiles = shared + kLoraN * sizeof(LoraColumn);
  const LoraShrinkTask task = args.tasks[blockIdx.x];
  const int split = static_cast<int>(blockIdx.y);
  if (split >= task.splits) return;
  const LoraStack stack = args.stacks[task.stack];
  spread_columns(stack, args.parts, columns);
  __syncthreads();

  constexpr int kDepth = Pipeline::kDepth;
  const std::int64_t begin = first_feature(task, split), end = first_feature(task, split + 1);
  Product product(task.rows, stack.columns, Pipeline::P::kLow);
  Pipeline::run(
      product, tiles, Product::kept(task.rows), static_cast<int>((end - begin + kDepth - 1) / kDepth),
      [&](auto& tile, int i, unsigned char* where) {
        tile.fetch(task.x, args.packs, task.row, task.rows, begin + i * kDepth, task.width, where);
      },
      [&](auto& tile, int i) {
        if constexpr (turned)
          tile.fetch_across(columns, stack.packs, begin + i * kDepth, task.width);
        else
          tile.fetch_along(columns, stack.packs, begin + i * kDepth, task.width);
      });

  auto* c = reinterpret_cast<float*>(tiles);
  product.to_shared(c);
  for (int i = static_cast<int>(threadIdx.x); i < task.rows * (kLoraN / 4); i += kLoraThreads) {
    const int row = i / (kLoraN / 4), at = i % (kLoraN / 4) * 4;
    const LoraColumn& column = columns[at];
    if (column.valid > 0)
      store_pack(column.u_row(task.row + row) + split * column.slab, load_pack<float, 4>(c + row * kLoraCStride + at));
  }
}

template <bool turned>
void launch_exact_lora_shrink(const LoraShrink& args, int tasks, int splits, cudaStream_t stream) {
  if (tasks == 0) return;
  launch(exact_lora_shrink_kernel<turned>, dim3(static_cast<unsigned>(tasks), static_cast<unsigned>(splits)),
         dim3(kLoraThreads), kLoraN * sizeof(LoraColumn) + LoraPipeline<LoraMode::kExact, false, turned>::kBytes,
         stream, args);
}

}  // namespace flexcore::cuda
