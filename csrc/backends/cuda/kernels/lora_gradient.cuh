#pragma once

#include "backends/cuda/kernels/lora_tile.cuh"

// Gradients of the adapters: grad_a += scale du^T x, grad_b += scale grad_y^T u. k = rows. Rows are divided into
// chunks; a gradient that several chunks contribute to is summed in slabs, which are added in their order.

namespace flexcore::cuda {

struct LoraGradientTask {
  Rows x;  // x for grad_a, grad_y for grad_b: [.., width]
  std::int64_t width;
  std::int64_t row;  // rows [row, row + rows) of x
  int rows,
      stack;  // whose u is the other factor (du for grad_a), one slab, and whose matrix is what is written or added to
};

struct LoraGradient {
  const LoraGradientTask* tasks;
  const LoraStack* stacks;
  const LoraPart* parts;
  bool packs;  // every row of every x
};

/// 128 features times one stack. Grid: (tasks, most feature tiles).
/// Floor: x or grad_y once per 64 stacked ranks, u once per feature tile (4 bytes, from L2), each slab written once;
/// 2 rows ranks width FLOP, times two (kBf16) or three (kSplit) mma.
template <LoraMode mode>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_gradient_kernel(const LoraGradient args) {
  using Pipeline = LoraPipeline<mode, true, true>;
  using Product = typename Pipeline::Product;
  FLEXCORE_SHARED(shared);
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  unsigned char* const tiles = shared + kLoraN * sizeof(LoraColumn);
  const LoraGradientTask task = args.tasks[blockIdx.x];
  const std::int64_t feature = static_cast<std::int64_t>(blockIdx.y) * kLoraM;
  if (feature >= task.width) return;
  const LoraStack stack = args.stacks[task.stack];
  spread_columns(stack, args.parts, columns);
  __syncthreads();

  const int features = static_cast<int>(task.width - feature < kLoraM ? task.width - feature : kLoraM);
  Product product(features, stack.columns, Pipeline::P::kLow);
  constexpr int kDepth = Pipeline::kDepth;
  Pipeline::run(
      product, tiles, kDepth, (task.rows + kDepth - 1) / kDepth,
      [&](auto& tile, int i, unsigned char* where) {
        tile.fetch(task.x, args.packs, task.row + i * kDepth, task.rows - i * kDepth, feature, task.width, where);
      },
      [&](auto& tile, int i) { tile.fetch_rows(columns, task.row + i * kDepth, task.rows - i * kDepth); });

  auto* c = reinterpret_cast<float*>(tiles);
  product.to_shared(c);
  const auto write = [&](int f, int at) {
    const LoraColumn& column = columns[at];
    if (column.valid == 0) return;
    float& to = column.matrix[(feature + f) * column.feature_step];
    const float value = column.scale * c[f * kLoraCStride + at];
    to = column.add ? to + value : value;
  };
  // Neighbouring threads write neighbours in memory: features of grad_a, ranks of grad_b.
  const int thread = static_cast<int>(threadIdx.x);
  if (columns[0].feature_step == 1) {
    for (int i = thread; i < stack.columns * kLoraM; i += kLoraThreads)
      if (i % kLoraM < features) write(i % kLoraM, i / kLoraM);
  } else {
    for (int i = thread; i < features * kLoraN; i += kLoraThreads)
      if (i % kLoraN < stack.columns) write(i / kLoraN, i % kLoraN);
  }
}

template <LoraMode mode>
void launch_lora_gradient(const LoraGradient& args, int tasks, std::int64_t most_width, cudaStream_t stream) {
  if (tasks == 0 || most_width == 0) return;
  launch(lora_gradient_kernel<mode>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>((most_width + kLoraM - 1) / kLoraM)),
         dim3(kLoraThreads), kLoraN * sizeof(LoraColumn) + LoraPipeline<mode, true, true>::kBytes, stream, args);
}

/// to[i] += slabs[i] + slabs[size + i] + ..., in this order.
struct LoraSum {
  float* to;
  const float* slabs;
  std::int64_t size;
  int num_slabs;
};

inline constexpr int kLoraSumBlock = 1024;  // elements of one block

/// Grid: (blocks of the longest sum, sums). Floor: (slabs + 2) * 4 bytes an element.
template <int N>
__global__ void __launch_bounds__(kLoraThreads) lora_sum_kernel(const LoraSum* sums) {
  const LoraSum sum = sums[blockIdx.y];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kLoraSumBlock;
  for (int i = static_cast<int>(threadIdx.x) * N; i < kLoraSumBlock; i += kLoraThreads * N) {
    if (begin + i >= sum.size) return;
    auto total = load_pack<float, N>(sum.slabs + begin + i);
    FLEXCORE_UNROLL_4
    for (int s = 1; s < sum.num_slabs; ++s) {
      const auto slab = load_pack<float, N>(sum.slabs + s * sum.size + begin + i);
      FLEXCORE_UNROLL
      for (int j = 0; j < N; ++j) total.at[j] += slab.at[j];
    }
    auto to = load_pack<float, N>(sum.to + begin + i);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) to.at[j] += total.at[j];
    store_pack(sum.to + begin + i, to);
  }
}

/// Where act(v) of a bottleneck adapter is made, in place; in the backward grad_u is multiplied by act'(v) first.
struct LoraActivation {
  float* u;
  float* grad_u;  // null in the forward
  std::int64_t size;
  int activation;  // ops/lora.h's Activation: 1 relu, 2 tanh, 3 gelu, 4 silu
};

/// `packs`: all sizes are multiples of four, and everything is aligned to 16 bytes.
inline void launch_lora_sums(const LoraSum* sums, std::size_t count, std::int64_t most_size, bool packs,
                             cudaStream_t stream) {
  constexpr std::size_t kMost = 65535;  // blockIdx.y
  for (std::size_t first = 0; first < count && most_size > 0; first += kMost)
    launch(packs ? lora_sum_kernel<4> : lora_sum_kernel<1>,
           dim3(static_cast<unsigned>((most_size + kLoraSumBlock - 1) / kLoraSumBlock),
                static_cast<unsigned>(count - first < kMost ? count - first : kMost)),
           dim3(kLoraThreads), 0, stream, sums + first);
}

}  // namespace flexcore::cuda
