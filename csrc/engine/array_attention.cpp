#include <vector>

#include "engine/array_ops.h"
#include "ops/attention.h"

namespace flexcore::ops {

namespace {

// The op's own check speaks of its argument struct; here are the names that the caller wrote.
KvPages require_pages(std::string_view op, const TensorView& k_pages, const TensorView& v_pages) {
  require(k_pages.ndim() == 4 && k_pages.shape(1) >= 1 && k_pages.shape(2) >= 1, op, ": k_pages is ", k_pages,
          ", wanted [num_blocks, num_kv_heads, block_size, head_dim]");
  require_float_rows(op, "k_pages", k_pages);
  require_contiguous(op, "k_pages", k_pages);
  require_like(op, "v_pages", v_pages, "k_pages", k_pages);
  require_dtype(op, "v_pages", v_pages, k_pages.dtype());
  require_contiguous(op, "v_pages", v_pages);
  return {k_pages, v_pages};
}

AttentionSpan make_span(std::string_view op, std::int64_t begin, std::int64_t end, std::int64_t position,
                        const std::int32_t* block_table, std::int64_t max_blocks, std::int64_t block_size) {
  require(position >= 0, op, ": position ", position, ", wanted >= 0");
  require(begin == end || position <= max_blocks * block_size - (end - begin), op, ": a block table of ", max_blocks,
          " pages of ", block_size, " tokens, wanted room for ", end - begin, " tokens from position ", position);
  return {begin, end, position, block_table};
}

std::vector<AttentionSpan> make_spans(std::string_view op, const PagedKv& kv, std::int64_t num_tokens) {
  const auto offsets = require_indptr(op, kv.indptr, num_tokens);
  const auto num_seqs = static_cast<std::int64_t>(offsets.size()) - 1;
  const std::int64_t max_blocks = kv.block_tables.ndim() == 2 ? kv.block_tables.shape(1) : 0;
  require_shape(op, "block_tables", kv.block_tables, {num_seqs, max_blocks});
  require_dtype(op, "block_tables", kv.block_tables, DType::kInt32);
  require(max_blocks <= 1 || kv.block_tables.stride(1) == 1, op, ": block_tables has stride ",
          kv.block_tables.stride(1), " in its last dimension, wanted 1");
  require_vector(op, "positions", kv.positions, num_seqs, DType::kInt32);
  std::vector<AttentionSpan> spans;
  for (std::int64_t i = 0; i < num_seqs; ++i)
    spans.push_back(make_span(op, offsets[i], offsets[i + 1], kv.positions.as<const std::int32_t>()[i],
                              kv.block_tables.row<const std::int32_t>(i), max_blocks, kv.k_pages.shape(2)));
  return spans;
}

}  // namespace

void kv_write(Runtime& runtime, const TensorView& k, const TensorView& v, const PagedKv& kv) {
  constexpr auto op = KvWriteArgs::kName;
  const KvPages pages = require_pages(op, kv.k_pages, kv.v_pages);
  require(k.ndim() == 3, op, ": k is ", k, ", wanted [num_tokens, num_kv_heads, head_dim]");
  run_op(runtime, KvWriteArgs{k, v, pages, make_spans(op, kv, k.shape(0))});
}

void attention(Runtime& runtime, const TensorView& q, const PagedKv& kv, const TensorView& y, const TensorView& lse,
               float scale, std::int64_t sliding_window) {
  constexpr auto op = AttentionArgs::kName;
  require(q.ndim() == 3, op, ": q is ", q, ", wanted [num_tokens, num_heads, head_dim]");
  const KvPages pages = require_pages(op, kv.k_pages, kv.v_pages);
  run_op(runtime, AttentionArgs{q, pages, make_spans(op, kv, q.shape(0)), y, lse, scale, sliding_window});
}

void attention_backward_window(Runtime& runtime, const AttentionWindow& window, const TensorView& grad_k,
                               const TensorView& grad_v, const TensorView& grad_q, const TensorView& grad_k_rows,
                               const TensorView& grad_v_rows) {
  constexpr std::string_view op = "attention_backward_window";
  const auto& w = window;
  require(w.grad_y.ndim() == 3, op, ": grad_y is ", w.grad_y, ", wanted [num_tokens, num_heads, head_dim]");
  const KvPages pages = require_pages(op, w.k_pages, w.v_pages);
  const std::int64_t num_tokens = w.grad_y.shape(0);
  require_vector(op, "block_table", w.block_table, w.block_table.ndim() == 1 ? w.block_table.shape(0) : 0,
                 DType::kInt32);
  const AttentionBackwardSpan span{make_span(op, 0, num_tokens, w.position, w.block_table.as<const std::int32_t>(),
                                             w.block_table.shape(0), pages.keys.shape(2)),
                                   grad_k.as<float>(), grad_v.as<float>()};
  for (const auto& [name, sums] : {std::pair{"grad_k", &grad_k}, std::pair{"grad_v", &grad_v}}) {
    require(sums->ndim() == 3 && sums->shape(0) >= w.position + num_tokens, op, ": ", name, " is ", *sums,
            ", wanted [>= ", w.position + num_tokens, ", num_kv_heads, head_dim]");
    require_shape(op, name, *sums, {sums->shape(0), pages.keys.shape(1), pages.keys.shape(3)});
    require_dtype(op, name, *sums, DType::kFloat32);
    require_contiguous(op, name, *sums);
  }
  run_op(
      runtime,
      AttentionBackwardArgs{
          w.grad_y, w.q, w.y, w.lse, pages, {&span, 1}, grad_q, grad_k_rows, grad_v_rows, w.scale, w.sliding_window});
}

}  // namespace flexcore::ops
