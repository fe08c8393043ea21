#pragma once

#include "backends/cuda/kernels/attention_problem.cuh"

// The small kernels around the backward pass: row sums before it, merging splits after it.

namespace flexcore::cuda {

/// delta[token, head] = sum over head_dim of grad_y * y. Eight lanes a head; bytes: both inputs once.
__global__ void __launch_bounds__(256) attention_delta_kernel(const HeadRows grad_y, const HeadRows y, int num_heads,
                                                              int head_dim, std::int64_t count, float* delta) {
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;
  const std::int64_t token = (i < count ? i : count - 1) / num_heads;
  const int head = static_cast<int>((i < count ? i : count - 1) - token * num_heads);
  float sum = 0.0f;
  for (int d = static_cast<int>(threadIdx.x) % 8 * kPackElements; d < head_dim; d += 8 * kPackElements) {
    float a[kPackElements], b[kPackElements];
    grad_y.load(token, head, d, a);
    y.load(token, head, d, b);
    FLEXCORE_UNROLL
    for (int j = 0; j < kPackElements; ++j) sum += a[j] * b[j];
  }
  FLEXCORE_UNROLL
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (i < count && threadIdx.x % 8 == 0) delta[i] = sum;
}

/// grad_q of rows whose keys were split: the sum of the splits in ascending order.
__global__ void __launch_bounds__(kMergeRows* kWarpSize)
    attention_grad_q_merge_kernel(const AttentionProblem p, const HeadRows grad_q, const float* partials,
                                  const AttentionMerge* merges) {
  const AttentionMerge m = merges[blockIdx.x];
  const int row = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (row >= m.num_rows) return;
  const int kv_head = static_cast<int>(blockIdx.y);
  const RowPlace place = place_of(p, m.span_row, 0, kv_head, m.row_begin + row);
  for (int d = lane * 4; d < p.head_dim; d += kWarpSize * 4) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < m.num_splits; ++i) {
      const std::int64_t at =
          (static_cast<std::int64_t>(m.partial) + static_cast<std::int64_t>(i) * m.split_rows + row) * p.num_kv_heads +
          kv_head;
      float x[4];
      Rows::load_floats(partials + at * p.head_dim + d, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] += x[j];
    }
    grad_q.store(place.token, place.head, d, sum);
  }
}

}  // namespace flexcore::cuda
