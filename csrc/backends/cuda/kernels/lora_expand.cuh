#pragma once

#include "backends/cuda/kernels/lora_tile.cuh"

// Expand: y += scale u B^T for one member, and grad_x += sum over members of scale du A. k = ranks, which stay in
// shared memory while the block goes through its columns of y.

namespace flexcore::cuda {

struct LoraExpandTask {
  Rows y;              // [.., width]
  std::int64_t width;  // out_features, or in_features for grad_x
  std::int64_t row;    // rows [row, row + rows) of y; rows * num_stacks <= kLoraPanelRows
  int rows;
  int stack, num_stacks;  // stacks [stack, stack + num_stacks) of kLoraExpandDepth columns, all summed
  int last_depth;         // columns of the last one, up to a multiple of 16; the others are full
};

struct LoraExpand {
  const LoraExpandTask* tasks;
  const LoraStack* stacks;
  const LoraPart* parts;
  int tiles;       // of 64 columns that one block goes through
  int tile_rows;   // rows of shared memory for one stack of u, and for C: 32, 64 or 128, no fewer than any task's
  int num_stacks;  // room for so many
  bool packs;      // every row of every y
};

inline constexpr int kLoraPanelRows = 512;
inline constexpr int kLoraMostStacks = kLoraPanelRows / 32;

template <LoraMode mode>
__host__ __device__ constexpr int lora_panel_low(int tile_rows) {
  return LoraLayout<mode, kLoraExpandDepth>::plane_bytes(tile_rows);
}
template <LoraMode mode>
__host__ __device__ constexpr int lora_panel_bytes(int tile_rows) {
  return lora_panel_low<mode>(tile_rows) * (mode == LoraMode::kExact ? 1 : 2);
}

/// scale * u of the task's rows, slabs added in their order, as the P side of the product.
template <LoraMode mode>
__device__ __forceinline__ void load_panel(const LoraColumn* columns, std::int64_t row, int rows, int kept,
                                           int tile_rows, unsigned char* panel) {
  constexpr int kAcross = kLoraExpandDepth / 4;
  const int at = static_cast<int>(threadIdx.x) % kAcross * 4;
  const LoraColumn column = columns[at];
  FLEXCORE_NO_UNROLL
  for (int i = static_cast<int>(threadIdx.x) / kAcross; i < kept; i += kLoraThreads / kAcross) {
    Pack<float, 4> sum{};
    if (i < rows && column.valid > 0) {
      const float* u = column.u_row(row + i);
      FLEXCORE_UNROLL_4
      for (int s = 0; s < column.slabs; ++s, u += column.slab) {
        const auto pack = load_pack<float, 4>(u);
        FLEXCORE_UNROLL
        for (int j = 0; j < 4; ++j) sum.at[j] += pack.at[j];
      }
      FLEXCORE_UNROLL
      for (int j = 0; j < 4; ++j) sum.at[j] *= column.scale;
    }
    LoraLayout<mode, kLoraExpandDepth>::put(panel, lora_panel_low<mode>(tile_rows), i, at, sum);
  }
}

/// A [128, 64] tile of y in packs of 16 bytes, four of them in a thread's registers at a time: all of a bfloat16 tile,
/// which is loaded before the product, or half of a float32 one.
template <class T>
struct LoraOutputTile {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  static constexpr int kAcross = kLoraN / kElements;
  static constexpr int kHeld = 4, kRowsHeld = kHeld * kLoraThreads / kAcross;
  static constexpr bool kEarly = kRowsHeld == kLoraM;
  Pack<T, kElements> packs[kHeld];

  static __device__ __forceinline__ int row_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kLoraThreads) / kAcross;
  }
  static __device__ __forceinline__ int column_of() { return static_cast<int>(threadIdx.x) % kAcross * kElements; }

  __device__ __forceinline__ void load(const T* y, std::int64_t stride, int rows, int left) {
    FLEXCORE_UNROLL
    for (int i = 0; i < kHeld; ++i)
      if (row_of(i) < rows && column_of() < left)
        packs[i] = load_pack<T, kElements>(y + row_of(i) * stride + column_of());
  }
  __device__ __forceinline__ void add_and_store(const float* c, T* y, std::int64_t stride, int rows, int left) {
    FLEXCORE_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      if (row_of(i) >= rows || column_of() >= left) continue;
      float sum[kElements];
      Rows::load_floats(c + row_of(i) * kLoraCStride + column_of(), sum);
      FLEXCORE_UNROLL
      for (int j = 0; j < kElements; ++j) packs[i].at[j] = from_float<T>(to_float(packs[i].at[j]) + sum[j]);
      store_pack(y + row_of(i) * stride + column_of(), packs[i]);
    }
  }
};

/// Grid: (tasks, column ranges of 64 * tiles). `along`: the matrix is A.
/// Floor: y read and written once; u of a row tile once per column range (slabs * 4 bytes), B once per row tile (from
/// L2); 2 rows ranks width FLOP, times three mma (kSplit).
template <LoraMode mode, class T, bool along>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_expand_kernel(const LoraExpand args) {
  using Q = LoraQTile<mode, along, kLoraExpandDepth>;
  using Product = LoraProduct<mode, false, along, kLoraExpandDepth>;
  FLEXCORE_SHARED(shared);
  const LoraExpandTask task = args.tasks[blockIdx.x];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * args.tiles * kLoraN;
  if (begin >= task.width) return;
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  auto* c = reinterpret_cast<float*>(shared + args.num_stacks * kLoraExpandDepth * sizeof(LoraColumn));
  auto* q_tiles = reinterpret_cast<unsigned char*>(c + args.tile_rows * kLoraCStride);
  unsigned char* const panels = q_tiles + 2 * Q::kBytes;

  bool stack_packs = true;
  for (int s = 0; s < task.num_stacks; ++s) {
    spread_columns(args.stacks[task.stack + s], args.parts, columns + s * kLoraExpandDepth, kLoraExpandDepth);
    stack_packs = stack_packs && args.stacks[task.stack + s].packs;
  }
  __syncthreads();
  const int kept = Product::kept(task.rows), panel_bytes = lora_panel_bytes<mode>(args.tile_rows);
  for (int s = 0; s < task.num_stacks; ++s)
    load_panel<mode>(columns + s * kLoraExpandDepth, task.row, task.rows, kept, args.tile_rows,
                     panels + s * panel_bytes);

  // Steps go through the stacks of one tile of y, then to the next tile.
  const std::int64_t tiles_left = (task.width - begin + kLoraN - 1) / kLoraN;
  const int tiles = static_cast<int>(tiles_left < args.tiles ? tiles_left : args.tiles), stacks = task.num_stacks;
  Q q;
  const auto fetch = [&](int tile, int s) {
    if constexpr (along)
      q.fetch_along(columns + s * kLoraExpandDepth, stack_packs, begin + tile * kLoraN, task.width);
    else
      q.fetch_across(columns + s * kLoraExpandDepth, stack_packs, begin + tile * kLoraN, task.width);
  };
  fetch(0, 0);
  Product product(task.rows, kLoraN, lora_panel_low<mode>(args.tile_rows));
  LoraOutputTile<T> output;
  for (int tile = 0; tile < tiles; ++tile) {
    const std::int64_t column = begin + tile * kLoraN, beyond = task.width - column;
    const int left = beyond < kLoraN ? static_cast<int>(beyond) : kLoraN;
    T* y = static_cast<T*>(task.y.data) + task.row * task.y.stride + column;
    if (output.kEarly && args.packs) output.load(y, task.y.stride, task.rows, left);
    product.clear();
    for (int s = 0; s < stacks; ++s) {
      unsigned char* const q_tile = q_tiles + (tile * stacks + s) % 2 * Q::kBytes;
      q.put(q_tile);
      if (s + 1 < stacks)
        fetch(tile, s + 1);
      else if (tile + 1 < tiles)
        fetch(tile + 1, 0);
      __syncthreads();
      product.step(panels + s * panel_bytes, q_tile, s + 1 < stacks ? kLoraExpandDepth : task.last_depth);
    }
    product.to_shared(c);
    if (args.packs) {
      FLEXCORE_NO_UNROLL
      for (int row = 0; row < task.rows; row += output.kRowsHeld) {
        T* const from = y + row * task.y.stride;
        if (!output.kEarly) output.load(from, task.y.stride, task.rows - row, left);
        output.add_and_store(c + row * kLoraCStride, from, task.y.stride, task.rows - row, left);
      }
    } else {
      FLEXCORE_NO_UNROLL
      for (int i = static_cast<int>(threadIdx.x); i < task.rows * kLoraN; i += kLoraThreads) {
        const int row = i / kLoraN, at = i % kLoraN;
        if (at < left) {
          T& out = y[row * task.y.stride + at];
          out = from_float<T>(to_float(out) + c[row * kLoraCStride + at]);
        }
      }
    }
  }
}

template <LoraMode mode, class T, bool along>
void launch_lora_expand(const LoraExpand& args, int tasks, std::int64_t most_width, cudaStream_t stream) {
  if (tasks == 0 || most_width == 0) return;
  const std::int64_t range = std::int64_t{args.tiles} * kLoraN;
  launch(lora_expand_kernel<mode, T, along>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>((most_width + range - 1) / range)),
         dim3(kLoraThreads),
         args.num_stacks * (kLoraExpandDepth * sizeof(LoraColumn) + lora_panel_bytes<mode>(args.tile_rows)) +
             args.tile_rows * kLoraCStride * sizeof(float) + 2 * LoraQTile<mode, along, kLoraExpandDepth>::kBytes,
         stream, args);
}

/// One part of one to four rows: a whole rank of one adapter.
struct LoraVectorExpandTask {
  Rows y;
  std::int64_t width, row;
  int rows, part;
};

struct LoraVectorExpand {
  const LoraVectorExpandTask* tasks;
  const LoraPart* parts;
  int columns;  // that one block computes, <= kLoraVectorColumns
};

inline constexpr int kLoraVectorColumns = 512, kLoraMostRank = 256;

/// y += scale u B^T in float32. The lanes of a warp lie along the ranks of as many rows of B as fill it, so that B is
/// read as one stream. N: elements of a load. Grid: (tasks, column ranges). Floor: B once (4 bytes).
template <int N>
__global__ void __launch_bounds__(kLoraThreads) lora_expand_vector_kernel(const LoraVectorExpand args) {
  constexpr int kBatch = 4;  // rows of B that a lane has in flight
  FLEXCORE_SHARED(shared);
  auto* u = reinterpret_cast<float*>(shared);        // [rows, kLoraMostRank]
  auto* sums = u + kLoraVectorRows * kLoraMostRank;  // [rows, columns]
  const LoraVectorExpandTask task = args.tasks[blockIdx.x];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * args.columns;
  if (begin >= task.width) return;
  const LoraPart part = args.parts[task.part];
  const int rank = part.ranks;
  for (int i = static_cast<int>(threadIdx.x); i < task.rows * rank; i += kLoraThreads) {
    const int row = i / rank, r = i % rank;
    const float* from = part.u + (task.row + row - part.first_row) * part.u_stride + r;
    float sum = 0.0f;
    FLEXCORE_UNROLL_4
    for (int s = 0; s < part.slabs; ++s) sum += from[s * part.slab];
    u[row * kLoraMostRank + r] = part.scale * sum;
  }
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x), items = rank / N;
  int group = 1;  // lanes of one row of B
  while (group < items && group < kWarpSize) group *= 2;
  const int groups = kLoraThreads / group, lane = thread % group;
  const std::int64_t left = task.width - begin;
  const int count = static_cast<int>(left < args.columns ? left : args.columns);
  const float* b = part.matrix + begin * part.feature_step;
  // Every lane goes through every round, as they meet in the sums.
  for (int first = 0; first < count; first += kBatch * groups) {
    float dots[kBatch][kLoraVectorRows] = {};
    for (int item = lane; item < items; item += group) {
      Pack<float, N> packs[kBatch];
      FLEXCORE_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int o = first + j * groups + thread / group;
        packs[j] = o < count ? load_pack<float, N>(b + o * part.feature_step + item * N) : Pack<float, N>{};
      }
      FLEXCORE_UNROLL
      for (int row = 0; row < kLoraVectorRows; ++row) {
        if (row >= task.rows) continue;
        const auto x = load_pack<float, N>(u + row * kLoraMostRank + item * N);
        FLEXCORE_UNROLL
        for (int j = 0; j < kBatch; ++j) FLEXCORE_UNROLL
        for (int i = 0; i < N; ++i) dots[j][row] = fmaf(packs[j].at[i], x.at[i], dots[j][row]);
      }
    }
    FLEXCORE_UNROLL
    for (int j = 0; j < kBatch; ++j) {
      const int o = first + j * groups + thread / group;
      FLEXCORE_UNROLL
      for (int row = 0; row < kLoraVectorRows; ++row) {
        if (row >= task.rows) continue;
        float dot = dots[j][row];
        for (int distance = group / 2; distance > 0; distance /= 2) dot += __shfl_xor_sync(kAllLanes, dot, distance);
        if (lane == 0 && o < count) sums[row * args.columns + o] = dot;
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < task.rows * count; i += kLoraThreads) {
    const int row = i / count, o = i % count;
    float y[1];
    task.y.load<1>(task.row + row, begin + o, y);
    y[0] += sums[row * args.columns + o];
    task.y.store<1>(task.row + row, begin + o, y);
  }
}

/// `packs`: every B is aligned to 16 bytes and every rank is a multiple of four.
inline void launch_lora_expand_vector(const LoraVectorExpand& args, int tasks, std::int64_t most_width, bool packs,
                                      cudaStream_t stream) {
  if (tasks == 0 || most_width == 0) return;
  launch(packs ? lora_expand_vector_kernel<4> : lora_expand_vector_kernel<1>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>((most_width + args.columns - 1) / args.columns)),
         dim3(kLoraThreads), kLoraVectorRows * (kLoraMostRank + args.columns) * sizeof(float), stream, args);
}

}  // namespace flexcore::cuda
