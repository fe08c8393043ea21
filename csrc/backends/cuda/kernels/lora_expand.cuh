#pragma once

#include "backends/cuda/kernels/lora_stream.cuh"

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
  int tile_rows;   // rows of shared memory for one stack of u: 32, 64 or 128, no fewer than any task's
  int num_stacks;  // room for so many
  bool packs;      // every row of every y
};

inline constexpr int kLoraPanelRows = 512;
inline constexpr int kLoraMostStacks = kLoraPanelRows / 32;

/// scale * u of four columns of a stack, slabs added in their order.
__device__ __forceinline__ Pack<float, 4> load_scaled_u(const LoraColumn& column, std::int64_t row) {
  Pack<float, 4> sum{};
  const float* u = column.u_row(row);
  FLEXCORE_UNROLL_4
  for (int s = 0; s < column.slabs; ++s, u += column.slab) {
    const auto pack = load_pack<float, 4>(u);
    FLEXCORE_UNROLL
    for (int j = 0; j < 4; ++j) sum.at[j] += pack.at[j];
  }
  FLEXCORE_UNROLL
  for (int j = 0; j < 4; ++j) sum.at[j] *= column.scale;
  return sum;
}

/// Spreads the stacks of a task; true if all of them can be read in packs. Readers need a barrier first.
__device__ __forceinline__ bool spread_stacks(const LoraExpand& args, const LoraExpandTask& task, LoraColumn* columns) {
  bool packs = true;
  for (int s = 0; s < task.num_stacks; ++s) {
    spread_columns(args.stacks[task.stack + s], args.parts, columns + s * kLoraExpandDepth, kLoraExpandDepth);
    packs = packs && args.stacks[task.stack + s].packs;
  }
  return packs;
}

/// Bytes of the left operand for 16 rows and 16 columns of u: the registers of 32 lanes, twice.
inline constexpr int kExpandFragment = 2 * kWarpSize * 16, kExpandSteps = kLoraExpandDepth / 16;
/// Rows and columns of y that a warp takes at once; eight columns a lane.
inline constexpr int kExpandRows = 32, kExpandColumns = 32;

/// u as the left operands of the products, high and low: fragment (16-row tile, 16 ranks) at
/// (tile * steps + step) * kExpandFragment.
__device__ __forceinline__ void load_fragments(const LoraExpandTask& task, const LoraColumn* columns, int steps,
                                               unsigned char* fragments) {
  const int kept = (task.rows + 15) / 16 * 16, quads = steps * 4;
  for (int i = static_cast<int>(threadIdx.x); i < kept * quads; i += kLoraThreads) {
    const int row = i / quads, quad = i % quads;
    const LoraColumn& column = columns[quad * 4];
    Pack<float, 4> u{};
    if (row < task.rows && column.valid > 0) u = load_scaled_u(column, task.row + row);
    // Ranks 4 q to 4 q + 3 of a row are the two pairs of lane (row % 8, q).
    auto* at = reinterpret_cast<unsigned*>(fragments + (row / 16 * steps + quad / 4) * kExpandFragment) +
               (row % 8 * 4 + quad % 4) * 4 + row % 16 / 8;
    const SplitPair first = split_pair(u.at[0], u.at[1]), second = split_pair(u.at[2], u.at[3]);
    at[0] = first.high, at[2] = second.high;
    at[kWarpSize * 4] = first.low, at[kWarpSize * 4 + 2] = second.low;
  }
}

/// The right operands of four n8 tiles, 32 columns of y, and 16 ranks: of tile t, lane (g, q) has column
/// 8 (g / 2) + 2 t + g % 2, so that its sums are eight neighbours: columns 8 q to 8 q + 7 of the rows.
template <bool along>
struct ExpandMatrix {
  SplitPair pairs[4][2];

  /// `columns`: the step's 16 ranks. `base`: the first column; `left`: how many of the 32 there are.
  __device__ __forceinline__ void load(const LoraColumn* columns, bool packs, std::int64_t base, int left) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, q = lane % 4;
    const LoraColumn& column = columns[4 * q];
    float e[4][4] = {};  // tile, rank
    if (column.valid > 0) {
      if constexpr (along) {
        FLEXCORE_UNROLL
        for (int r = 0; r < 4; ++r) {
          if (r >= column.valid) continue;
          const int at = g / 2 * 8;
          const float* from = columns[4 * q + r].matrix + base + at;
          if (packs && at + 8 <= left) {
            float x[8];
            Rows::load_floats(from, x);
            FLEXCORE_UNROLL
            for (int t = 0; t < 4; ++t) e[t][r] = g % 2 == 0 ? x[2 * t] : x[2 * t + 1];
          } else {
            FLEXCORE_UNROLL
            for (int t = 0; t < 4; ++t)
              if (at + 2 * t + g % 2 < left) e[t][r] = from[2 * t + g % 2];
          }
        }
      } else {
        FLEXCORE_UNROLL
        for (int t = 0; t < 4; ++t) {
          const int at = g / 2 * 8 + 2 * t + g % 2;
          if (at >= left) continue;
          const float* from = column.matrix + (base + at) * column.feature_step;
          const auto quad = packs ? load_quad<true>(from, column.valid) : load_quad<false>(from, column.valid);
          FLEXCORE_UNROLL
          for (int r = 0; r < 4; ++r) e[t][r] = quad.at[r];
        }
      }
    }
    FLEXCORE_UNROLL
    for (int t = 0; t < 4; ++t) {
      pairs[t][0] = split_pair(e[t][0], e[t][1]);
      pairs[t][1] = split_pair(e[t][2], e[t][3]);
    }
  }
};

/// Eight neighbours of a row of y.
template <class T>
struct ExpandOutput {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kPacks = 8 / kElements;
  Pack<T, kElements> packs[kPacks];

  __device__ __forceinline__ void load(const T* y, bool whole, int left) {
    FLEXCORE_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      if (whole && left >= 8) {
        packs[p] = load_pack<T, kElements>(y + p * kElements);
      } else {
        FLEXCORE_UNROLL
        for (int i = 0; i < kElements; ++i)
          if (p * kElements + i < left) packs[p].at[i] = y[p * kElements + i];
      }
    }
  }
  __device__ __forceinline__ void add(int i, float x) {
    T& to = packs[i / kElements].at[i % kElements];
    to = from_float<T>(to_float(to) + x);
  }
  __device__ __forceinline__ void store(T* y, bool whole, int left) const {
    FLEXCORE_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      if (whole && left >= 8) {
        store_pack(y + p * kElements, packs[p]);
      } else {
        FLEXCORE_UNROLL
        for (int i = 0; i < kElements; ++i)
          if (p * kElements + i < left) y[p * kElements + i] = packs[p].at[i];
      }
    }
  }
};

inline int expand_bytes(const LoraExpand& args) {
  return args.num_stacks * (kLoraExpandDepth * static_cast<int>(sizeof(LoraColumn)) +
                            args.tile_rows / 16 * kExpandSteps * kExpandFragment);
}

/// Grid: (tasks, column ranges of 64 * tiles). `along`: the matrix is A.
/// Floor: y read and written once; u of a row tile once per column range (slabs * 4 bytes), B once per 32 rows (from
/// L2); 2 rows ranks width FLOP, times three mma.
template <class T, bool along>
__global__ void __launch_bounds__(kLoraThreads, 2) lora_expand_kernel(const LoraExpand args) {
  FLEXCORE_SHARED(shared);
  const LoraExpandTask task = args.tasks[blockIdx.x];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * args.tiles * kLoraN;
  if (begin >= task.width) return;
  auto* const columns = reinterpret_cast<LoraColumn*>(shared);
  unsigned char* const fragments = shared + args.num_stacks * kLoraExpandDepth * sizeof(LoraColumn);
  const bool stack_packs = spread_stacks(args, task, columns);
  __syncthreads();
  const int steps = ((task.num_stacks - 1) * kLoraExpandDepth + task.last_depth) / 16;
  load_fragments(task, columns, steps, fragments);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int g = lane / 4, q = lane % 4;
  const std::int64_t beyond = task.width - begin, range = std::int64_t{args.tiles} * kLoraN;
  const int width = static_cast<int>(beyond < range ? beyond : range);
  const int row_pairs = (task.rows + kExpandRows - 1) / kExpandRows;
  const int items = row_pairs * ((width + kExpandColumns - 1) / kExpandColumns);
  // Warps side by side have the same columns: the matrix comes once from L2.
  const auto first_row_of = [&](int item) { return item % row_pairs * kExpandRows; };
  const auto first_column_of = [&](int item) { return item / row_pairs * kExpandColumns; };
  const auto y_of = [&](int item) {
    return static_cast<T*>(task.y.data) + (task.row + first_row_of(item) + g) * task.y.stride + begin +
           first_column_of(item) + 8 * q;
  };
  ExpandOutput<T> output[4];
  const auto load_output = [&](int item) {
    const T* const y = y_of(item);
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (g + 8 * i < task.rows - first_row_of(item))
        output[i].load(y + 8 * i * task.y.stride, args.packs, width - first_column_of(item) - 8 * q);
  };
  constexpr int kWarps = kLoraThreads / kWarpSize;
  if (warp < items) load_output(warp);
  for (int item = warp; item < items; item += kWarps) {
    const int first_row = first_row_of(item), rows = task.rows - first_row;
    const int first_column = first_column_of(item), left = width - first_column;
    float c[2][4][4] = {};
    for (int step = 0; step < steps; ++step) {
      ExpandMatrix<along> matrix;
      matrix.load(columns + step * 16, stack_packs, begin + first_column, left);
      FLEXCORE_UNROLL
      for (int m = 0; m < 2; ++m) {
        if (16 * m >= rows) continue;
        const unsigned char* at = fragments + ((first_row / 16 + m) * steps + step) * kExpandFragment + lane * 16;
        unsigned a[4], a_low[4];
        load_words(at, a);
        load_words(at + kWarpSize * 16, a_low);
        FLEXCORE_UNROLL
        for (int t = 0; t < 4; ++t) {
          const SplitPair &first = matrix.pairs[t][0], &second = matrix.pairs[t][1];
          mma_bf16(c[m][t], a, first.low, second.low);
          mma_bf16(c[m][t], a_low, first.high, second.high);
          mma_bf16(c[m][t], a, first.high, second.high);
        }
      }
    }
    ExpandOutput<T> sums[4];
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i) {
      sums[i] = output[i];
      FLEXCORE_UNROLL
      for (int t = 0; t < 4; ++t) {
        sums[i].add(2 * t, c[i / 2][t][i % 2 * 2]);
        sums[i].add(2 * t + 1, c[i / 2][t][i % 2 * 2 + 1]);
      }
    }
    if (item + kWarps < items) load_output(item + kWarps);  // on its way while this one is stored
    T* const y = y_of(item);
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (g + 8 * i < rows) sums[i].store(y + 8 * i * task.y.stride, args.packs, left - 8 * q);
  }
}

template <class T, bool along>
void launch_lora_expand(const LoraExpand& args, int tasks, std::int64_t most_width, cudaStream_t stream) {
  if (tasks == 0 || most_width == 0) return;
  const std::int64_t range = std::int64_t{args.tiles} * kLoraN;
  launch(lora_expand_kernel<T, along>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>((most_width + range - 1) / range)),
         dim3(kLoraThreads), static_cast<std::size_t>(expand_bytes(args)), stream, args);
}

/// The same in float32, with FMA: a tile of y [128, 64] at a time.
template <bool along>
__global__ void __launch_bounds__(kLoraThreads, 2) exact_lora_expand_kernel(const LoraExpand args) {
  constexpr LoraMode kMode = LoraMode::kExact;
  using Q = LoraQTile<kMode, along, kLoraExpandDepth>;
  using Product = LoraProduct<kMode, false, along, kLoraExpandDepth>;
  using Layout = LoraLayout<kMode, kLoraExpandDepth>;
  FLEXCORE_SHARED(shared);
  const LoraExpandTask task = args.tasks[blockIdx.x];
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * args.tiles * kLoraN;
  if (begin >= task.width) return;
  auto* columns = reinterpret_cast<LoraColumn*>(shared);
  auto* c = reinterpret_cast<float*>(shared + args.num_stacks * kLoraExpandDepth * sizeof(LoraColumn));
  auto* q_tiles = reinterpret_cast<unsigned char*>(c + args.tile_rows * kLoraCStride);
  unsigned char* const panels = q_tiles + 2 * Q::kBytes;
  const int panel_bytes = Layout::plane_bytes(args.tile_rows);

  const bool stack_packs = spread_stacks(args, task, columns);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), kept = Product::kept(task.rows);
  constexpr int kAcross = kLoraExpandDepth / 4;
  for (int s = 0; s < task.num_stacks; ++s) {
    const int at = thread % kAcross * 4;
    const LoraColumn& column = columns[s * kLoraExpandDepth + at];
    FLEXCORE_NO_UNROLL
    for (int i = thread / kAcross; i < kept; i += kLoraThreads / kAcross) {
      Pack<float, 4> u{};
      if (i < task.rows && column.valid > 0) u = load_scaled_u(column, task.row + i);
      Layout::put(panels + s * panel_bytes, 0, i, at, u);
    }
  }

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
  Product product(task.rows, kLoraN, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const std::int64_t column = begin + tile * kLoraN, beyond = task.width - column;
    const int left = beyond < kLoraN ? static_cast<int>(beyond) : kLoraN;
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
    float* const y = static_cast<float*>(task.y.data) + task.row * task.y.stride + column;
    FLEXCORE_NO_UNROLL
    for (int i = thread; i < task.rows * kLoraN; i += kLoraThreads) {
      const int row = i / kLoraN, at = i % kLoraN;
      if (at < left) y[row * task.y.stride + at] += c[row * kLoraCStride + at];
    }
  }
}

template <bool along>
void launch_exact_lora_expand(const LoraExpand& args, int tasks, std::int64_t most_width, cudaStream_t stream) {
  if (tasks == 0 || most_width == 0) return;
  constexpr LoraMode kMode = LoraMode::kExact;
  const std::int64_t range = std::int64_t{args.tiles} * kLoraN;
  const int bytes = args.num_stacks * (kLoraExpandDepth * static_cast<int>(sizeof(LoraColumn)) +
                                       LoraLayout<kMode, kLoraExpandDepth>::plane_bytes(args.tile_rows)) +
                    args.tile_rows * kLoraCStride * static_cast<int>(sizeof(float)) +
                    2 * LoraQTile<kMode, along, kLoraExpandDepth>::kBytes;
  launch(exact_lora_expand_kernel<along>,
         dim3(static_cast<unsigned>(tasks), static_cast<unsigned>((most_width + range - 1) / range)),
         dim3(kLoraThreads), static_cast<std::size_t>(bytes), stream, args);
}

}  // namespace flexcore::cuda
