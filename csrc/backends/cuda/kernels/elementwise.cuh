#pragma once

#include "backends/cuda/kernels/rows.cuh"

// Norms, rotary, silu * up, rows in and out. All are bound by memory: each row is read and written once, in packs of 16
// bytes, and arithmetic is float.

namespace flexcore::cuda {

/// f.run<N>(row, column) for every pack of N elements of every row. A block covers a part of one row.
template <int N, class F>
__global__ void __launch_bounds__(256) map_rows_kernel(const F f, std::int64_t width) {
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column < width) f.template run<N>(blockIdx.x, column);
}

template <class F>
void map_rows(const F& f, std::int64_t rows, std::int64_t width, bool packs, cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  const std::int64_t items = packs ? width / kPackElements : width;
  const unsigned threads = items >= 256 ? 256 : static_cast<unsigned>((items + kWarpSize - 1) / kWarpSize * kWarpSize);
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>((items + threads - 1) / threads));
  packs ? launch(map_rows_kernel<kPackElements, F>, grid, dim3(threads), 0, stream, f, width)
        : launch(map_rows_kernel<1, F>, grid, dim3(threads), 0, stream, f, width);
}

/// y[i] (+)= x[index[i]], or x[i] without an index. A row whose index is not one of x's becomes NaN.
struct CopyRows {
  Rows x, y;
  const std::int32_t* index;
  std::int64_t num_rows;  // of x, when there is an index
  bool accumulate;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    float a[N];
    const std::int64_t from = index == nullptr ? row : index[row];
    if (index != nullptr && (from < 0 || from >= num_rows)) {
      FLEXCORE_UNROLL
      for (int i = 0; i < N; ++i) a[i] = __int_as_float(0x7fc00000);
    } else {
      x.load<N>(from, column, a);
    }
    if (accumulate) {
      float b[N];
      y.load<N>(row, column, b);
      FLEXCORE_UNROLL
      for (int i = 0; i < N; ++i) a[i] += b[i];
    }
    y.store<N>(row, column, a);
  }
};

/// y[index[i]] = x[i]; an index that is not a row of y writes nothing.
struct ScatterRows {
  Rows x, y;
  const std::int32_t* index;
  std::int64_t num_rows;  // of y

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    const std::int64_t to = index[row];
    if (to < 0 || to >= num_rows) return;
    float a[N];
    x.load<N>(row, column, a);
    y.store<N>(to, column, a);
  }
};

/// Where a row of the batch is kept; store null: it is not.
struct RowStore {
  std::byte* store;
  std::int64_t length, depth;
};

/// Row i becomes row `depth` of the tensor that begins offset * length bytes into its store.
struct SaveRows {
  Rows x;
  const RowStore* stores;
  std::int64_t offset, width;
  bool is_bf16;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    const RowStore to = stores[row];
    if (to.store == nullptr) return;
    float a[N];
    x.load<N>(row, column, a);
    Rows{to.store + offset * to.length, width, is_bf16}.store<N>(to.depth, column, a);
  }
};

/// y = silu(gate) * up.
struct SiluMul {
  Rows gate, up, y;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    float g[N], u[N];
    gate.load<N>(row, column, g);
    up.load<N>(row, column, u);
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) g[i] = g[i] / (1.0f + __expf(-g[i])) * u[i];
    y.store<N>(row, column, g);
  }
};

/// grad_up = grad_y * silu(gate), grad_gate = grad_y * up * s * (1 + gate * (1 - s)), s = sigmoid(gate); null outputs
/// are left out.
struct SiluMulBackward {
  Rows grad_y, gate, up, grad_gate, grad_up;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    float d[N], g[N], u[N];
    grad_y.load<N>(row, column, d);
    gate.load<N>(row, column, g);
    up.load<N>(row, column, u);
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) {
      const float s = 1.0f / (1.0f + __expf(-g[i])), x = g[i];
      g[i] = d[i] * u[i] * s * (1.0f + x * (1.0f - s));
      u[i] = d[i] * x * s;
    }
    if (grad_gate.data != nullptr) grad_gate.store<N>(row, column, g);
    if (grad_up.data != nullptr) grad_up.store<N>(row, column, u);
  }
};

/// Pairs (i, i + half) of every head, turned by the position's angle. Columns count the first halves of all heads.
struct Rotary {
  Rows x, y;
  std::int64_t x_head, y_head;  // elements between heads
  std::int64_t half;
  const std::int32_t* positions;
  std::int64_t num_positions;
  const float *cos, *sin;  // [num_positions, half]
  float sign;              // -1: the other way round

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    const std::int64_t head = column / half, i = column % half, position = positions[row];
    float a[N], b[N], c[N], s[N];
    x.load<N>(row, head * x_head + i, a);
    x.load<N>(row, head * x_head + half + i, b);
    const bool known = position >= 0 && position < num_positions;
    Rows::load_floats(cos + (known ? position : 0) * half + i, c);
    Rows::load_floats(sin + (known ? position : 0) * half + i, s);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      const float cj = known ? c[j] : __int_as_float(0x7fc00000), sj = sign * s[j], first = a[j];
      a[j] = first * cj - b[j] * sj;
      b[j] = b[j] * cj + first * sj;
    }
    y.store<N>(row, head * y_head + i, a);
    y.store<N>(row, head * y_head + half + i, b);
  }
};

struct RmsNorm {
  Rows x, y;
  const float* weight;
  float eps;
};

struct RmsNormBackward {
  Rows grad_y, x, grad_x;
  const float* weight;
  float eps;
  bool accumulate;
};

/// A block, of whole warps, a row; or a row for each of the block's warps (blockDim.y > 1, blockDim.x = 32).
struct RowOfBlock {
  std::int64_t row;
  int thread, threads;
  float* slots;

  __device__ __forceinline__ explicit RowOfBlock(float* shared)
      : row(static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y),
        thread(static_cast<int>(threadIdx.x)),
        threads(static_cast<int>(blockDim.x)),
        slots(shared) {}
  __device__ __forceinline__ float sum(float x) const {
    if (threads == kWarpSize) return warp_sum(x);
    return block_sum(x, slots);
  }
};

/// y = x / sqrt(mean(x^2) + eps) * weight. Rows are read twice; the second time they are in the first-level cache.
template <int N>
__global__ void __launch_bounds__(512) rms_norm_kernel(const RmsNorm a, std::int64_t rows, std::int64_t width) {
  FLEXCORE_SHARED(shared);
  const RowOfBlock block(reinterpret_cast<float*>(shared));
  if (block.row >= rows) return;  // whole warps
  float squares = 0.0f;
  for (std::int64_t i = block.thread * N; i < width; i += block.threads * N) {
    float x[N];
    a.x.load<N>(block.row, i, x);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) squares += x[j] * x[j];
  }
  const float r = rsqrtf(block.sum(squares) / static_cast<float>(width) + a.eps);
  for (std::int64_t i = block.thread * N; i < width; i += block.threads * N) {
    float x[N], w[N];
    a.x.load<N>(block.row, i, x);
    Rows::load_floats(a.weight + i, w);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) x[j] = x[j] * r * w[j];
    a.y.store<N>(block.row, i, x);
  }
}

/// grad_x (+)= r * (g - n * mean(g * n)), n = x r, g = grad_y * weight.
template <int N>
__global__ void __launch_bounds__(512)
    rms_norm_backward_kernel(const RmsNormBackward a, std::int64_t rows, std::int64_t width) {
  FLEXCORE_SHARED(shared);
  const RowOfBlock block(reinterpret_cast<float*>(shared));
  const RowOfBlock second(reinterpret_cast<float*>(shared) + kWarpSize);
  if (block.row >= rows) return;
  float squares = 0.0f, products = 0.0f;
  for (std::int64_t i = block.thread * N; i < width; i += block.threads * N) {
    float x[N], d[N], w[N];
    a.x.load<N>(block.row, i, x);
    a.grad_y.load<N>(block.row, i, d);
    Rows::load_floats(a.weight + i, w);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      squares += x[j] * x[j];
      products += d[j] * w[j] * x[j];
    }
  }
  const float inverse = 1.0f / static_cast<float>(width);
  const float r = rsqrtf(block.sum(squares) * inverse + a.eps);
  const float mean = second.sum(products) * r * inverse;  // of g * n
  for (std::int64_t i = block.thread * N; i < width; i += block.threads * N) {
    float x[N], d[N], w[N];
    a.x.load<N>(block.row, i, x);
    a.grad_y.load<N>(block.row, i, d);
    Rows::load_floats(a.weight + i, w);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) d[j] = r * (d[j] * w[j] - x[j] * r * mean);
    if (a.accumulate) {
      a.grad_x.load<N>(block.row, i, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < N; ++j) d[j] += x[j];
    }
    a.grad_x.store<N>(block.row, i, d);
  }
}

/// One of the two norm kernels over all rows: a warp a row up to 1,024 elements, a block beyond.
template <class Args, class Kernel>
void over_norm_rows(Kernel packed, Kernel single, const Args& args, std::int64_t rows, std::int64_t width, bool packs,
                    cudaStream_t stream) {
  if (rows == 0 || width == 0) return;
  dim3 block(kWarpSize, 4);
  if (width > 1024) block = dim3(width >= 4096 ? 512 : 256, 1);
  const dim3 grid(static_cast<unsigned>((rows + block.y - 1) / block.y));
  launch(packs ? packed : single, grid, block, 2 * kWarpSize * sizeof(float), stream, args, rows, width);
}

}  // namespace flexcore::cuda
