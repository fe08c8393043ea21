#pragma once

#include <algorithm>

#include "backends/cuda/attention_tables.h"
#include "backends/cuda/views.h"

// Attention's tensors as its kernels take them.
namespace flexcore::cuda {

/// [num_tokens, heads, head_dim]
inline HeadRows head_rows_of(const TensorView& x) {
  return {rows_of(x), x.stride(1), packs_of(rows_of(x), x.shape(2)) && x.stride(1) % kPackElements == 0};
}

/// Pages as rows of head_dim.
inline Rows page_rows_of(const TensorView& pages) {
  return {pages.data(), pages.shape(3), pages.dtype() == DType::kBFloat16};
}

inline std::int64_t page_rows(const TensorView& pages) { return pages.stride(0) / pages.shape(3); }

inline AttentionProblem attention_problem(const TensorView& q, const TensorView& y, const TensorView& lse,
                                          const KvPages& pages, float scale, std::int64_t sliding_window) {
  AttentionProblem p;
  p.keys = page_rows_of(pages.keys);
  p.values = page_rows_of(pages.values);
  p.page_rows = page_rows(pages.keys);
  p.page_packs = aligned_for_packs(pages.keys) && aligned_for_packs(pages.values);
  p.num_kv_heads = static_cast<int>(pages.keys.shape(1));
  p.group = static_cast<int>(q.shape(1) / pages.keys.shape(1));
  p.block_size = static_cast<int>(std::min<std::int64_t>(pages.keys.shape(2), INT_MAX));
  p.head_dim = static_cast<int>(pages.keys.shape(3));
  p.window = sliding_window > 0 ? static_cast<int>(std::min<std::int64_t>(sliding_window, INT_MAX)) : INT_MAX;
  p.scale = scale;
  p.q = head_rows_of(q);
  p.y = head_rows_of(y);
  if (lse) {
    p.lse = lse.as<float>();
    p.lse_stride = lse.stride(0);
  }
  return p;
}

inline AttentionHeads heads_of(const AttentionProblem& p, std::int64_t sliding_window) {
  return {p.group, p.num_kv_heads, p.block_size, sliding_window};
}

/// Whether operands are what tensor cores and 16-byte copies take; all else is computed in float32.
template <class... Operands>
bool on_tensor_cores(const AttentionProblem& p, const Operands&... operands) {
  return p.keys.is_bf16 && p.page_packs && ((operands.tokens.is_bf16 && operands.packs) && ...);
}

/// f.operator()<D>() with the row length that kernels are compiled for.
template <class F>
void over_head_dims(int head_dim, F&& f) {
  if (head_dim <= 64)
    f.template operator()<64>();
  else if (head_dim <= 128)
    f.template operator()<128>();
  else
    f.template operator()<256>();
}

}  // namespace flexcore::cuda
