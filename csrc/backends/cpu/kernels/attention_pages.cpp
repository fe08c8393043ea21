#include "backends/cpu/kernels/attention_entries.h"
#include "backends/cpu/kernels/attention_panels.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

using namespace attention;  // NOLINT: this file is the building blocks' user

template <class From, class To>
void convert(const void* x, std::int64_t size, void* y) {
  const auto* in = static_cast<const From*>(x);
  auto* out = static_cast<To*>(y);
  for (std::int64_t i = 0; i < size; ++i) out[i] = from_float<To>(to_float(in[i]));
}

// Between equal types the bits are kept, NaN's too.
void copy(const void* x, bool from_bf16, std::int64_t size, void* y, bool to_bf16) {
  if (from_bf16 == to_bf16)
    __builtin_memcpy(y, x, static_cast<std::size_t>(size) * (to_bf16 ? sizeof(bfloat16) : sizeof(float)));
  else if (to_bf16)
    convert<float, bfloat16>(x, size, y);
  else
    convert<bfloat16, float>(x, size, y);
}

void write_pages(const HeadRows& k, const HeadRows& v, const AttentionProblem& p, const AttentionTile& tile) {
  const std::size_t width = p.bf16_pages ? sizeof(bfloat16) : sizeof(float);
  AttentionTile t = tile;
  for (std::int64_t token = 0; token < t.num_tokens; ++token) {
    for (t.kv_head = 0; t.kv_head < p.num_kv_heads; ++t.kv_head) {
      const auto at = static_cast<std::size_t>(page_offset(p, t, t.position + token)) * width;
      copy(head_row(k, t.token + token, t.kv_head), k.bf16, p.head_dim,
           static_cast<char*>(const_cast<void*>(p.keys)) + at, p.bf16_pages);
      copy(head_row(v, t.token + token, t.kv_head), v.bf16, p.head_dim,
           static_cast<char*>(const_cast<void*>(p.values)) + at, p.bf16_pages);
    }
  }
}

std::int64_t padded_dim(std::int64_t head_dim) { return pad_dim(head_dim); }

}  // namespace

const AttentionKernels& attention_kernels() {
  static constexpr AttentionKernels kTable{
      .padded_dim = padded_dim,
      .write_pages = write_pages,
      .forward_scratch = attention_forward_scratch,
      .forward = attention_forward,
      .forward_split = attention_forward_split,
      .forward_merge = attention_forward_merge,
      .backward_scratch = attention_backward_scratch,
      .backward = attention_backward,
      .backward_reduce = attention_backward_reduce,
  };
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
