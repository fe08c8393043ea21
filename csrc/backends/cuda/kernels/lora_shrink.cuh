#pragma once

#include "backends/cuda/kernels/lora_tile.cuh"

// Shrink: u = x A^T for all members that share x, and du = grad_y B. k = features, which are divided among `splits`
// blocks; each writes a slab of u, and who reads u adds the slabs in their order.

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
  bool packs;  // every row of every x; for vectors, every stack too
};

/// Where the part of a split begins: a multiple of 64 features, or the width.
__device__ __forceinline__ std::int64_t first_feature(const LoraShrinkTask& task, int split) {
  const std::int64_t steps = (task.width + kLoraK - 1) / kLoraK, feature = kLoraK * (steps * split / task.splits);
  return feature < task.width ? feature : task.width;
}

/// Rows [row, row + rows <= 128) times one stack. Grid: (tasks, most splits).
/// Floor: x once per 64 stacked ranks (2 or 4 bytes an element), A once per row tile (4 bytes, from L2 after the
/// first), slabs rows * ranks * 4 * splits bytes; 2 rows ranks width FLOP, times two (kBf16) or three (kSplit) mma.
template <LoraMode mode, bool turned>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_shrink_kernel(const LoraShrink args) {
  using Pipeline = LoraPipeline<mode, false, turned>;
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
    // Rows of u are whole quads long; what lies beyond the rank becomes zero.
    if (column.valid > 0)
      store_pack(column.u_row(task.row + row) + split * column.slab, load_pack<float, 4>(c + row * kLoraCStride + at));
  }
}

template <LoraMode mode, bool turned>
void launch_lora_shrink(const LoraShrink& args, int tasks, int splits, cudaStream_t stream) {
  if (tasks == 0) return;
  launch(lora_shrink_kernel<mode, turned>, dim3(static_cast<unsigned>(tasks), static_cast<unsigned>(splits)),
         dim3(kLoraThreads), kLoraN * sizeof(LoraColumn) + LoraPipeline<mode, false, turned>::kBytes, stream, args);
}

/// Features of x that one block of the vector path keeps in shared memory, as floats.
inline constexpr int kLoraVectorDepth = 1024;

/// The same for rows <= kLoraVectorRows, u = x A^T only; a warp takes every eighth column. Floor: A once (4 bytes).
template <int N>
__global__ void __launch_bounds__(kLoraThreads) lora_shrink_vector_kernel(const LoraShrink args) {
  FLEXCORE_SHARED(shared);
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  auto* x = reinterpret_cast<float*>(shared + kLoraN * sizeof(LoraColumn));  // [rows, kLoraVectorDepth]
  const LoraShrinkTask task = args.tasks[blockIdx.x];
  const int split = static_cast<int>(blockIdx.y);
  if (split >= task.splits) return;
  const LoraStack stack = args.stacks[task.stack];
  spread_columns(stack, args.parts, columns);
  const std::int64_t first = first_feature(task, split);
  const int depth = static_cast<int>(first_feature(task, split + 1) - first);
  for (int row = 0; row < task.rows; ++row)
    for (int k = static_cast<int>(threadIdx.x) * N; k < depth; k += kLoraThreads * N) {
      float part[N];
      task.x.load<N>(task.row + row, first + k, part);
      FLEXCORE_UNROLL
      for (int i = 0; i < N; ++i) x[row * kLoraVectorDepth + k + i] = part[i];
    }
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int c = warp; c < stack.columns; c += kLoraThreads / kWarpSize) {
    const LoraColumn& column = columns[c];
    if (column.valid == 0) continue;
    const float* a = column.matrix + first;
    float sums[kLoraVectorRows] = {};
    FLEXCORE_UNROLL_4
    for (int k = lane * N; k < depth; k += kWarpSize * N) {
      const auto pack = load_pack<float, N>(a + k);
      FLEXCORE_UNROLL
      for (int row = 0; row < kLoraVectorRows; ++row) {
        if (row >= task.rows) continue;
        const auto part = load_pack<float, N>(x + row * kLoraVectorDepth + k);
        FLEXCORE_UNROLL
        for (int i = 0; i < N; ++i) sums[row] = fmaf(pack.at[i], part.at[i], sums[row]);
      }
    }
    FLEXCORE_UNROLL
    for (int row = 0; row < kLoraVectorRows; ++row) {
      if (row >= task.rows) continue;
      const float sum = warp_sum(sums[row]);
      if (lane == 0) column.u_row(task.row + row)[split * column.slab] = sum;
    }
  }
}

inline void launch_lora_shrink_vector(const LoraShrink& args, int tasks, int splits, cudaStream_t stream) {
  if (tasks == 0) return;
  launch(args.packs ? lora_shrink_vector_kernel<4> : lora_shrink_vector_kernel<1>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>(splits)), dim3(kLoraThreads),
         kLoraN * sizeof(LoraColumn) + kLoraVectorRows * kLoraVectorDepth * sizeof(float), stream, args);
}

}  // namespace flexcore::cuda
