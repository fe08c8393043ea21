#include "ops/attention.h"

#include <algorithm>
#include <limits>

namespace flexcore {

namespace {

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }

// Each without gaps, and none within another.
bool dense_pages(const TensorView& pages) {
  const std::int64_t dim = pages.shape(3), rows = pages.shape(1) * pages.shape(2);
  return pages.stride(3) == 1 && pages.stride(2) == dim && pages.stride(1) == pages.shape(2) * dim &&
         (pages.shape(0) <= 1 || (pages.stride(0) >= rows * dim && dim > 0 && pages.stride(0) % dim == 0));
}

void check_pages(std::string_view op, const KvPages& pages) {
  const TensorView &keys = pages.keys, &values = pages.values;
  require(keys.ndim() == 4 && is_float(keys.dtype()) && dense_pages(keys), op, ": pages.keys is ", keys,
          ", wanted float32 or bfloat16 [num_blocks, num_kv_heads, block_size, head_dim], every page contiguous");
  bool alike = values.ndim() == 4 && values.dtype() == keys.dtype();
  for (int i = 0; i < 4; ++i) alike = alike && values.shape(i) == keys.shape(i) && values.stride(i) == keys.stride(i);
  require(alike, op, ": pages.values is ", values, ", wanted like pages.keys, ", keys);
  require(keys.shape(1) >= 1 && keys.shape(2) >= 1, op, ": pages.keys is ", keys,
          ", wanted at least one kv head and one token in a block");
  const std::int64_t dim = keys.shape(3);
  require(dim >= 8 && dim <= 256 && dim % 8 == 0, op, ": head_dim ", dim, ", wanted a multiple of 8 up to 256");
}

// [num_tokens, heads, head_dim], whatever the strides of the first two.
void check_heads(std::string_view op, std::string_view name, const TensorView& x, std::int64_t num_tokens,
                 std::int64_t heads, std::int64_t dim) {
  require(x.ndim() == 3 && is_float(x.dtype()) && x.shape(0) == num_tokens && x.shape(1) == heads &&
              x.shape(2) == dim && x.stride(2) == 1 && (num_tokens == 0 || x),
          op, ": ", name, " is ", x, ", wanted float32 or bfloat16 [", num_tokens, ", ", heads, ", ", dim,
          "], last dimension dense");
}

void check_lse(std::string_view op, const TensorView& lse, std::int64_t num_tokens, std::int64_t heads) {
  require(lse.ndim() == 2 && lse.dtype() == DType::kFloat32 && lse.shape(0) == num_tokens && lse.shape(1) == heads &&
              lse.stride(1) == 1 && (num_tokens == 0 || lse),
          op, ": lse is ", lse, ", wanted float32 [", num_tokens, ", ", heads, "], last dimension dense");
}

void check_span(std::string_view op, const AttentionSpan& span, std::int64_t num_tokens, const KvPages& pages) {
  require(0 <= span.row_begin && span.row_begin <= span.row_end && span.row_end <= num_tokens, op, ": span of rows [",
          span.row_begin, ", ", span.row_end, "), wanted rows of [0, ", num_tokens, ")");
  require(span.position >= 0, op, ": span at position ", span.position, ", wanted >= 0");
  if (span.row_begin == span.row_end) return;
  require(span.block_table != nullptr, op, ": span without a block table");
  const std::int64_t num_blocks = pages.keys.shape(0), block_size = pages.keys.shape(2);
  const std::int64_t used = (span.position + span.row_end - span.row_begin + block_size - 1) / block_size;
  // A negative page is a large unsigned one; the maximum alone tells, and the loop vectorises.
  std::uint32_t highest = 0;
  for (std::int64_t i = 0; i < used; ++i) highest = std::max(highest, static_cast<std::uint32_t>(span.block_table[i]));
  require(highest < static_cast<std::uint64_t>(num_blocks), op, ": page ", static_cast<std::int32_t>(highest),
          " in a block table, wanted pages of [0, ", num_blocks, ")");
}

struct Heads {
  std::int64_t tokens, query, dim;
};

Heads check_query(std::string_view op, const TensorView& q, const KvPages& pages, std::int64_t sliding_window) {
  check_pages(op, pages);
  require(q.ndim() == 3, op, ": q is ", q, ", wanted [num_tokens, num_heads, head_dim]");
  const Heads heads{q.shape(0), q.shape(1), pages.keys.shape(3)};
  check_heads(op, "q", q, heads.tokens, heads.query, heads.dim);
  require(heads.query >= 1 && heads.query % pages.keys.shape(1) == 0, op, ": ", heads.query,
          " query heads, wanted a multiple of the ", pages.keys.shape(1), " kv heads");
  require(sliding_window >= 0 && sliding_window <= std::numeric_limits<std::int32_t>::max(), op, ": sliding_window ",
          sliding_window, ", wanted 0 to 2147483647");
  return heads;
}

}  // namespace

void check(const KvWriteArgs& args) {
  constexpr auto op = KvWriteArgs::kName;
  check_pages(op, args.pages);
  require(args.k.ndim() == 3, op, ": k is ", args.k, ", wanted [num_tokens, num_kv_heads, head_dim]");
  const std::int64_t num_tokens = args.k.shape(0), heads = args.pages.keys.shape(1), dim = args.pages.keys.shape(3);
  check_heads(op, "k", args.k, num_tokens, heads, dim);
  check_heads(op, "v", args.v, num_tokens, heads, dim);
  for (const auto& span : args.spans) check_span(op, span, num_tokens, args.pages);
}

void check(const AttentionArgs& args) {
  constexpr auto op = AttentionArgs::kName;
  const Heads heads = check_query(op, args.q, args.pages, args.sliding_window);
  check_heads(op, "y", args.y, heads.tokens, heads.query, heads.dim);
  if (args.lse) check_lse(op, args.lse, heads.tokens, heads.query);
  for (const auto& span : args.spans) check_span(op, span, heads.tokens, args.pages);
}

void check(const AttentionBackwardArgs& args) {
  constexpr auto op = AttentionBackwardArgs::kName;
  const Heads heads = check_query(op, args.q, args.pages, args.sliding_window);
  check_heads(op, "grad_y", args.grad_y, heads.tokens, heads.query, heads.dim);
  check_heads(op, "y", args.y, heads.tokens, heads.query, heads.dim);
  check_lse(op, args.lse, heads.tokens, heads.query);
  check_heads(op, "grad_q", args.grad_q, heads.tokens, heads.query, heads.dim);
  const std::int64_t kv_heads = args.pages.keys.shape(1);
  check_heads(op, "grad_k_rows", args.grad_k_rows, heads.tokens, kv_heads, heads.dim);
  check_heads(op, "grad_v_rows", args.grad_v_rows, heads.tokens, kv_heads, heads.dim);
  for (const auto& window : args.spans) {
    check_span(op, window.span, heads.tokens, args.pages);
    require(window.span.row_begin == window.span.row_end || (window.grad_k != nullptr && window.grad_v != nullptr), op,
            ": span without accumulators grad_k, grad_v");
  }
}

}  // namespace flexcore
