#pragma once

#include "backends/cuda/kernels/rows.cuh"

// Many tensors in one launch: a block takes one chunk of one tensor. All are bound by memory; per element AdamW moves
// 28 bytes, SGD 12, a sum of squares 4.

namespace flexcore::cuda {

inline constexpr int kOptimizerThreads = 256;
/// Elements of a block. Sums of squares are cut here, so it is part of their arithmetic.
inline constexpr std::int64_t kOptimizerChunk = 4096;
/// Floats that a thread handles at once: 16 bytes.
inline constexpr int kOptimizerPack = 4;

/// Which part of which tensor a block works on.
struct TensorChunk {
  std::int32_t tensor, index;
};

/// f.run<N>(i) for packs of N elements of the block's chunk; single elements at the end, or when `packs` is false.
template <class F>
__device__ __forceinline__ void over_chunk(const TensorChunk& chunk, std::int64_t size, bool packs, F&& f) {
  const std::int64_t begin = chunk.index * kOptimizerChunk;
  const std::int64_t end = begin + kOptimizerChunk < size ? begin + kOptimizerChunk : size;
  const std::int64_t whole = packs ? begin + (end - begin) / kOptimizerPack * kOptimizerPack : begin;
  for (std::int64_t i = begin + threadIdx.x * kOptimizerPack; i < whole; i += kOptimizerThreads * kOptimizerPack)
    f.template run<kOptimizerPack>(i);
  for (std::int64_t i = whole + threadIdx.x; i < end; i += kOptimizerThreads) f.template run<1>(i);
}

struct AdamWStep {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_correction2, eps, step_size;
};

struct AdamWTensor {
  float* param;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  std::int64_t size;
  bool packs;  // every pointer is 16-byte aligned
};

struct AdamWUpdate {
  const AdamWTensor& t;
  const AdamWStep& s;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t i) const {
    float p[N], g[N], m[N], v[N];
    Rows::load_floats(t.param + i, p);
    Rows::load_floats(t.grad + i, g);
    Rows::load_floats(t.exp_avg + i, m);
    Rows::load_floats(t.exp_avg_sq + i, v);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      const float grad = s.grad_scale * g[j];
      m[j] += s.one_minus_beta1 * (grad - m[j]);
      v[j] = s.beta2 * v[j] + s.one_minus_beta2 * grad * grad;
      p[j] = s.decay * p[j] - s.step_size * m[j] / (sqrtf(v[j]) / s.sqrt_correction2 + s.eps);
    }
    Rows::store_floats(t.param + i, p);
    Rows::store_floats(t.exp_avg + i, m);
    Rows::store_floats(t.exp_avg_sq + i, v);
  }
};

__global__ void __launch_bounds__(kOptimizerThreads)
    adamw_kernel(const AdamWTensor* tensors, const TensorChunk* chunks, const AdamWStep step) {
  const TensorChunk chunk = chunks[blockIdx.x];
  const AdamWTensor tensor = tensors[chunk.tensor];
  over_chunk(chunk, tensor.size, tensor.packs, AdamWUpdate{tensor, step});
}

struct SgdTensor {
  float* param;
  const float* grad;
  std::int64_t size;
  bool packs;
};

struct SgdStep {
  float learning_rate, weight_decay, grad_scale;
};

struct SgdUpdate {
  const SgdTensor& t;
  const SgdStep& s;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t i) const {
    float p[N], g[N];
    Rows::load_floats(t.param + i, p);
    Rows::load_floats(t.grad + i, g);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) p[j] -= s.learning_rate * (s.grad_scale * g[j] + s.weight_decay * p[j]);
    Rows::store_floats(t.param + i, p);
  }
};

__global__ void __launch_bounds__(kOptimizerThreads)
    sgd_kernel(const SgdTensor* tensors, const TensorChunk* chunks, const SgdStep step) {
  const TensorChunk chunk = chunks[blockIdx.x];
  const SgdTensor tensor = tensors[chunk.tensor];
  over_chunk(chunk, tensor.size, tensor.packs, SgdUpdate{tensor, step});
}

struct SquaredTensor {
  const float* data;
  std::int64_t size;
  bool packs;
};

struct SumOfSquares {
  const float* data;
  double& sum;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t i) const {
    float x[N];
    Rows::load_floats(data + i, x);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  }
};

/// sums[block] = sum of squares of the block's chunk.
__global__ void __launch_bounds__(kOptimizerThreads)
    sum_squares_kernel(const SquaredTensor* tensors, const TensorChunk* chunks, double* sums) {
  FLEXCORE_SHARED(shared);
  const TensorChunk chunk = chunks[blockIdx.x];
  const SquaredTensor tensor = tensors[chunk.tensor];
  double sum = 0;
  over_chunk(chunk, tensor.size, tensor.packs, SumOfSquares{tensor.data, sum});
  sum = block_sum(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/// *result = sum of `count` numbers, by one block and in an order that depends on their count alone.
__global__ void __launch_bounds__(1024) add_up_kernel(const double* sums, std::int64_t count, double* result) {
  FLEXCORE_SHARED(shared);
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
  sum = block_sum(sum, reinterpret_cast<double*>(shared));
  if (threadIdx.x == 0) *result = sum;
}

}  // namespace flexcore::cuda
