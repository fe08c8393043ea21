#pragma once

#include "backends/cuda/kernels/attention_problem.cuh"

// The small kernels around the forward pass: merging splits, writing pages.

namespace flexcore::cuda {

/// For every row whose keys were split, the results of its splits in ascending order. A warp a row; bytes: the partial
/// results and the output, each once.
__global__ void __launch_bounds__(kMergeRows* kWarpSize)
    attention_merge_kernel(const AttentionProblem p, const AttentionPartials partials, const AttentionMerge* merges) {
  const AttentionMerge m = merges[blockIdx.x];
  const int row = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (row >= m.num_rows) return;
  const int kv_head = static_cast<int>(blockIdx.y);
  const RowPlace place = place_of(p, m.span_row, 0, kv_head, m.row_begin + row);
  const auto at = [&](int split) {
    return (static_cast<std::int64_t>(m.partial) + static_cast<std::int64_t>(split) * m.split_rows + row) *
               p.num_kv_heads +
           kv_head;
  };
  float most = minus_infinity(), total = 0.0f;
  for (int i = 0; i < m.num_splits; ++i) most = fmaxf(most, partials.stats[at(i)].x);
  for (int i = 0; i < m.num_splits; ++i) {
    const float2 s = partials.stats[at(i)];
    total += exp2f(s.x - most) * s.y;
  }
  for (int d = lane * 4; d < p.head_dim; d += kWarpSize * 4) {
    float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < m.num_splits; ++i) {
      const float factor = exp2f(partials.stats[at(i)].x - most);
      float x[4];
      Rows::load_floats(partials.sums + at(i) * p.head_dim + d, x);
      FLEXCORE_UNROLL
      for (int j = 0; j < 4; ++j) y[j] += factor * x[j];
    }
    FLEXCORE_UNROLL
    for (int j = 0; j < 4; ++j) y[j] /= total;
    p.y.store(place.token, place.head, d, y);
  }
  if (p.lse != nullptr && lane == 0) p.lse[place.token * p.lse_stride + place.head] = (most + log2f(total)) * kLn2;
}

/// For map_rows: rows are slots, columns run over heads and dimensions.
struct WritePages {
  HeadRows k, v;
  Rows keys, values;
  const KvSlot* slots;
  int head_dim, block_size;

  template <int N>
  __device__ __forceinline__ void run(std::int64_t row, std::int64_t column) const {
    const KvSlot slot = slots[row];
    if (slot.row < 0) return;
    const int head = static_cast<int>(column) / head_dim, d = static_cast<int>(column) - head * head_dim;
    const std::int64_t to = slot.row + static_cast<std::int64_t>(head) * block_size;
    float x[N];
    k.tokens.load<N>(slot.token, head * k.head_stride + d, x);
    keys.store<N>(to, d, x);
    v.tokens.load<N>(slot.token, head * v.head_stride + d, x);
    values.store<N>(to, d, x);
  }
};

}  // namespace flexcore::cuda
