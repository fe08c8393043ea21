#pragma once

#include "backends/cuda/kernels/rows.cuh"

// Between the two products of linear + cross-entropy: the softmax over a chunk of the vocabulary, online. Logits are
// read once or twice from the second-level cache, probabilities written once; the products are what costs.

namespace flexcore::cuda {

inline constexpr int kSoftmaxThreads = 256;

/// Softmax denominator of what has been seen of a row's columns: sum of exp(x - max).
struct SoftmaxState {
  float max, sum;
};

/// The logits of a chunk of the vocabulary, cut into gridDim.y parts of `part_width` columns.
struct LogitChunk {
  const float* logits;  // [rows, columns]
  std::int64_t stride;  // between rows, a multiple of kPackElements: what lies beyond `columns` may be read
  int columns, part_width;

  /// f(column, x) for packs of the part's columns; x is -infinity beyond the end.
  template <class F>
  __device__ __forceinline__ void over_part(int part, F&& f) const {
    const int begin = part * part_width, end = begin + part_width < columns ? begin + part_width : columns;
    const float* row = logits + blockIdx.x * stride;
    for (int i = begin + static_cast<int>(threadIdx.x) * kPackElements; i < end; i += kSoftmaxThreads * kPackElements) {
      float x[kPackElements];
      Rows::load_floats(row + i, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < kPackElements; ++j) x[j] = i + j < columns ? x[j] : __int_as_float(0xff800000);
      f(i, x);
    }
  }
  __device__ __forceinline__ float part_max(int part) const {
    float top = __int_as_float(0xff800000);
    over_part(part, [&](int, const float (&x)[kPackElements]) {
      FLEXCORE_UNROLL
      for (int j = 0; j < kPackElements; ++j) top = fmaxf(top, x[j]);
    });
    return top;
  }
};

/// maxima[row, part] = largest logit of the part. Only where a row has several parts.
__global__ void __launch_bounds__(kSoftmaxThreads) chunk_max_kernel(const LogitChunk chunk, float* maxima) {
  FLEXCORE_SHARED(shared);
  const float top = block_max(chunk.part_max(static_cast<int>(blockIdx.y)), reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) maxima[static_cast<std::int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = top;
}

/// Takes a chunk into the rows' states. Every part of a row carries the same maximum and the sum of its own columns.
struct AbsorbChunk {
  LogitChunk chunk;
  const float* maxima;  // [rows, parts]; null: one part, whose maximum is found here
  Rows exponentials;    // [rows, columns], exp(logit - max) in the weight's dtype; null: loss only
  float* weighted;      // [rows, width], scaled when the maximum moves; null: nothing there yet
  std::int64_t weighted_stride;
  int width;                   // hidden_size
  const std::int32_t* labels;  // [rows]
  std::int64_t first_token;    // of the chunk
  bool first;                  // no chunk before
  SoftmaxState* states;        // [rows, parts]
  float* label_logits;         // [rows]; NaN until the chunk with the label
};

__global__ void __launch_bounds__(kSoftmaxThreads) absorb_chunk_kernel(const AbsorbChunk a) {
  FLEXCORE_SHARED(shared);
  auto* slots = reinterpret_cast<float*>(shared);
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  const int part = static_cast<int>(blockIdx.y), parts = static_cast<int>(gridDim.y);
  const float lowest = __int_as_float(0xff800000);
  SoftmaxState* state = a.states + row * parts + part;
  const SoftmaxState old = a.first ? SoftmaxState{lowest, 0.0f} : *state;

  float top = old.max;
  if (a.maxima == nullptr)
    top = fmaxf(top, a.chunk.part_max(part));
  else
    for (int i = static_cast<int>(threadIdx.x); i < parts; i += kSoftmaxThreads)
      top = fmaxf(top, a.maxima[row * parts + i]);
  top = block_max(top, slots);
  // With nothing but -infinity so far, the differences are taken from 0: they stay -infinity instead of NaN.
  const float base = top == lowest ? 0.0f : top;
  const float factor = old.max == top ? 1.0f : expf(old.max - base);

  float sum = 0.0f;
  a.chunk.over_part(part, [&](int column, float (&x)[kPackElements]) {
    FLEXCORE_UNROLL
    for (int j = 0; j < kPackElements; ++j) sum += x[j] = expf(x[j] - base);
    if (a.exponentials.data != nullptr) a.exponentials.store<kPackElements>(row, column, x);
  });
  sum = block_sum(sum, slots + kWarpSize);
  if (threadIdx.x == 0) {
    *state = {top, old.sum * factor + sum};
    const std::int64_t column = a.labels[row] - a.first_token;
    if (part == 0 && column >= 0 && column < a.chunk.columns)
      a.label_logits[row] = a.chunk.logits[row * a.chunk.stride + column];
    else if (part == 0 && a.first)
      a.label_logits[row] = __int_as_float(0x7fc00000);
  }
  if (a.weighted == nullptr || factor == 1.0f) return;
  for (int i = part * kSoftmaxThreads + static_cast<int>(threadIdx.x); i < a.width; i += parts * kSoftmaxThreads)
    a.weighted[row * a.weighted_stride + i] *= factor;
}

/// loss = log(sum) + max - label's logit; grad = scale * (weighted / sum - W[label]). Both are NaN for a label that is
/// no token.
struct FinishCrossEntropy {
  const SoftmaxState* states;  // [rows, parts]
  int parts;
  const float* label_logits;   // [rows]
  const std::int32_t* labels;  // [rows]
  float* loss;                 // [rows]
  Rows weighted;               // [rows, width] float, may be `grad`
  Rows weight;                 // [vocab_size, width]
  std::int64_t vocab_size;
  const float* scale;  // [rows]
  Rows grad;           // [rows, width]; null: loss only
  int width;
};

template <int N>
__global__ void __launch_bounds__(kSoftmaxThreads) finish_cross_entropy_kernel(const FinishCrossEntropy a) {
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  float sum = 0.0f;
  for (int i = 0; i < a.parts; ++i) sum += a.states[row * a.parts + i].sum;
  if (threadIdx.x == 0)
    a.loss[row] = static_cast<float>(log(static_cast<double>(sum)) + static_cast<double>(a.states[row * a.parts].max) -
                                     static_cast<double>(a.label_logits[row]));
  if (a.grad.data == nullptr) return;
  const std::int32_t label = a.labels[row];
  const bool known = label >= 0 && label < a.vocab_size;
  const float inverse = 1.0f / sum, scale = known ? a.scale[row] : __int_as_float(0x7fc00000);
  for (int i = static_cast<int>(threadIdx.x) * N; i < a.width; i += kSoftmaxThreads * N) {
    float x[N], w[N];
    a.weighted.load<N>(row, i, x);
    a.weight.load<N>(known ? label : 0, i, w);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) x[j] = scale * (x[j] * inverse - w[j]);
    a.grad.store<N>(row, i, x);
  }
}

/// One row of logits that are there: its loss, and its gradient in its place. Both are NaN for a label that is no
/// token.
struct RowCrossEntropy {
  float* logits;  // [rows, columns]
  std::int64_t stride, columns;
  const std::int32_t* labels;  // [rows]
  float* loss;                 // [rows]
  const float* scale;          // [rows]; null: loss only
};

__global__ void __launch_bounds__(kSoftmaxThreads) row_cross_entropy_kernel(const RowCrossEntropy a) {
  FLEXCORE_SHARED(shared);
  auto* slots = reinterpret_cast<float*>(shared);
  const auto row = static_cast<std::int64_t>(blockIdx.x);
  float* logits = a.logits + row * a.stride;
  const std::int32_t label = a.labels[row];
  const bool known = label >= 0 && label < a.columns;
  const float nan = __int_as_float(0x7fc00000), label_logit = known ? logits[label] : nan;
  float top = __int_as_float(0xff800000), sum = 0.0f;
  for (std::int64_t i = threadIdx.x; i < a.columns; i += kSoftmaxThreads) top = fmaxf(top, logits[i]);
  top = block_max(top, slots);
  for (std::int64_t i = threadIdx.x; i < a.columns; i += kSoftmaxThreads) sum += expf(logits[i] - top);
  sum = block_sum(sum, slots + kWarpSize);
  if (threadIdx.x == 0)
    a.loss[row] =
        static_cast<float>(log(static_cast<double>(sum)) + static_cast<double>(top) - static_cast<double>(label_logit));
  if (a.scale == nullptr) return;
  const float scale = known ? a.scale[row] : nan, factor = scale / sum;
  for (std::int64_t i = threadIdx.x; i < a.columns; i += kSoftmaxThreads)
    logits[i] = factor * expf(logits[i] - top) - (i == label ? scale : 0.0f);
}

}  // namespace flexcore::cuda
