#pragma once

#include "backends/cuda/kernels/philox.cuh"
#include "backends/cuda/kernels/rows.cuh"

// What bypass networks do beside LoRA's products: scaled columns, dropout, the norms of DoRA. All are bound by memory.

namespace flexcore::cuda {

struct ScaleRun {
  std::int64_t begin, end;  // rows
  const float* scale;
  const float* offset;  // null: 0
};

/// Segments of one launch, by value: no table has to be brought to the device.
inline constexpr int kScaleRuns = 64;
struct ScaleRuns {
  ScaleRun run[kScaleRuns];
  int count;
  int first_row;  // of the grid
};

/// x = offset + scale * (x - offset), in place. Grid: (rows from the first run's first to the last one's last,
/// columns).
template <int N>
__global__ void __launch_bounds__(256) scale_rows_kernel(const Rows x, const ScaleRuns runs, std::int64_t width) {
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  const std::int64_t row = runs.first_row + static_cast<std::int64_t>(blockIdx.x);
  if (column >= width) return;
  // The last run that begins at or before the row.
  int low = 0, high = runs.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (runs.run[middle].begin <= row ? low : high) = middle;
  }
  const ScaleRun run = runs.run[low];
  if (row < run.begin || row >= run.end) return;
  float v[N], s[N];
  x.load<N>(row, column, v);
  Rows::load_floats(run.scale + column, s);
  if (run.offset == nullptr) {
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) v[i] *= s[i];
  } else {
    float o[N];
    Rows::load_floats(run.offset + column, o);
    FLEXCORE_UNROLL
    for (int i = 0; i < N; ++i) v[i] = o[i] + s[i] * (v[i] - o[i]);
  }
  x.store<N>(row, column, v);
}

struct ScaleGradient {
  Rows grad_y, x;
  std::int64_t begin, end, width;
  const float* offset;   // null: 0
  const float* divisor;  // null: 1
  float* grad_scale;
};

inline constexpr int kScaleGradientRows = 8;

/// grad_scale[j] += (sum over rows of grad_y * (x - offset)) / divisor. A warp's lanes are columns, the warps of a
/// block share the rows; sums are added in their order. Grid: columns / 32.
__global__ void __launch_bounds__(kWarpSize* kScaleGradientRows) scale_gradient_kernel(const ScaleGradient a) {
  FLEXCORE_SHARED(shared);
  auto* sums = reinterpret_cast<float*>(shared);
  const int lane = static_cast<int>(threadIdx.x), part = static_cast<int>(threadIdx.y);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWarpSize + lane;
  const bool inside = column < a.width;
  const float offset = inside && a.offset != nullptr ? a.offset[column] : 0.0f;
  float sum = 0.0f;
  for (std::int64_t row = a.begin + part; inside && row < a.end; row += kScaleGradientRows) {
    float g[1], x[1];
    a.grad_y.load<1>(row, column, g);
    a.x.load<1>(row, column, x);
    sum += g[0] * (x[0] - offset);
  }
  sums[part * kWarpSize + lane] = sum;
  __syncthreads();
  if (part != 0 || !inside) return;
  for (int i = 1; i < kScaleGradientRows; ++i) sum += sums[i * kWarpSize + lane];
  const float divisor = a.divisor == nullptr ? 1.0f : a.divisor[column];
  a.grad_scale[column] += divisor == 0.0f ? sum : sum / divisor;
}

struct Dropout {
  Rows x, y;
  std::int64_t width;
  std::uint64_t seed;
  unsigned position, module, sequence;  // position of row 0
  unsigned threshold;
  float kept, dropped;  // factors
  bool accumulate;
};

/// A thread has the eight features of one call of the generator (ops/dropout.h), 16 apart. Grid: (rows, features / 128
/// / 16 in blocks of 256 threads).
__global__ void __launch_bounds__(256) dropout_kernel(const Dropout a) {
  const std::int64_t call = static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x, row = blockIdx.x;
  const std::int64_t first = call / 16 * 128 + call % 16;
  if (first >= a.width) return;
  unsigned x[4] = {static_cast<unsigned>(call), a.position + static_cast<unsigned>(row), a.module, a.sequence};
  philox(a.seed, x);
  FLEXCORE_UNROLL
  for (int n = 0; n < 8; ++n) {
    const std::int64_t column = first + n * 16;
    if (column >= a.width) return;
    const unsigned number = n % 2 == 0 ? x[n / 2] & 0xffffu : x[n / 2] >> 16;
    float v[1], before[1] = {0.0f};
    a.x.load<1>(row, column, v);
    if (a.accumulate) a.y.load<1>(row, column, before);
    const float factor = number < a.threshold ? a.dropped : a.kept;
    v[0] = before[0] + (factor == 0.0f ? 0.0f : factor * v[0]);  // zero times infinity is not dropped
    a.y.store<1>(row, column, v);
  }
}

struct DoraNorm {
  const float* weight;  // rows [first, first + rows) of W, [rows, width]
  std::int64_t width, first;
  const float *lora_a, *lora_b;
  int rank;
  float scaling;
  const float* magnitude;  // null: the norm itself
  float *norm, *scale;
};

/// A block a row: norm = |w + scaling * b A|. Floor: A from L2 once a row, 2 rank FLOP an element.
__global__ void __launch_bounds__(256) dora_norm_kernel(const DoraNorm d) {
  FLEXCORE_SHARED(shared);
  auto* b = reinterpret_cast<float*>(shared);  // [rank], then slots
  const std::int64_t row = blockIdx.x, i = d.first + row;
  for (int r = static_cast<int>(threadIdx.x); r < d.rank; r += 256) b[r] = d.scaling * d.lora_b[i * d.rank + r];
  __syncthreads();
  float squares = 0.0f;
  for (std::int64_t k = threadIdx.x; k < d.width; k += 256) {
    float v = d.weight[row * d.width + k];
    for (int r = 0; r < d.rank; ++r) v += b[r] * d.lora_a[r * d.width + k];
    squares += v * v;
  }
  const float norm = sqrtf(block_sum(squares, b + d.rank));
  if (threadIdx.x != 0) return;
  d.norm[i] = norm;
  d.scale[i] = d.magnitude == nullptr ? 1.0f : norm == 0.0f ? 0.0f : d.magnitude[i] / norm;
}

}  // namespace flexcore::cuda
