#pragma once

#include <span>

#include "ops/registry.h"

namespace flexcore {

/// One layer's keys and values for every page of the pool. A page holds `block_size` tokens of one sequence. Pages may
/// lie apart, by a whole number of rows of head_dim.
struct KvPages {
  TensorView keys;    // [num_blocks, num_kv_heads, block_size, head_dim] float32 or bfloat16; keys are stored rotated
  TensorView values;  // like keys, and as far apart
};

/// A run of consecutive tokens of one sequence inside a batch: a decode row, a prefill chunk or a finetune window.
struct AttentionSpan {
  std::int64_t row_begin = 0, row_end = 0;    // rows of the batch
  std::int64_t position = 0;                  // position of the first row in its sequence
  const std::int32_t* block_table = nullptr;  // page of each block of the sequence, up to the last row's position
};

/// Stores the batch's keys and values in their pages.
struct KvWriteArgs {
  static constexpr std::string_view kName = "kv_write";
  TensorView k;  // [num_tokens, num_kv_heads, head_dim] float32 or bfloat16, rotated
  TensorView v;  // like k
  KvPages pages;
  std::span<const AttentionSpan> spans;
};
void check(const KvWriteArgs& args);

/// Causal attention of every span's rows over its sequence's pages, positions 0..row's own (grouped-query; optional
/// sliding window: a row at position p sees positions > p - sliding_window). A row's result does not depend on how its
/// sequence was cut into spans, nor on the rest of the batch (same bits).
struct AttentionArgs {
  static constexpr std::string_view kName = "attention";
  TensorView q;  // [num_tokens, num_heads, head_dim] float32 or bfloat16, rotated
  KvPages pages;
  std::span<const AttentionSpan> spans;
  TensorView y;    // like q in shape, float32 or bfloat16
  TensorView lse;  // [num_tokens, num_heads] float32: log-sum-exp of the scaled scores; empty: not wanted
  float scale = 1.0f;
  std::int64_t sliding_window = 0;  // 0: none
};
void check(const AttentionArgs& args);

/// Accumulators of one sequence in backward, for one layer: rows [0, b) of the window's end b receive gradients.
struct AttentionBackwardSpan {
  AttentionSpan span;       // rows of this batch; position = a, b = a + rows
  float* grad_k = nullptr;  // [sequence_length, num_kv_heads, head_dim], += (FlexLLM section 6.1)
  float* grad_v = nullptr;  // likewise
};

/// Windowed backward (DESIGN section 4): windows of a sequence come right to left. Recomputes P from q, the pages and
/// lse, adds to grad_k and grad_v of rows [0, b), and copies rows [a, b), which are final after this call, to
/// grad_k_rows and grad_v_rows.
struct AttentionBackwardArgs {
  static constexpr std::string_view kName = "attention_backward";
  TensorView grad_y;  // [num_tokens, num_heads, head_dim] float32 or bfloat16
  TensorView q;       // like grad_y in shape, rotated
  TensorView y;       // forward's output
  TensorView lse;     // [num_tokens, num_heads] float32
  KvPages pages;
  std::span<const AttentionBackwardSpan> spans;
  TensorView grad_q;       // like q in shape, float32 or bfloat16
  TensorView grad_k_rows;  // [num_tokens, num_kv_heads, head_dim] float32 or bfloat16
  TensorView grad_v_rows;  // like grad_k_rows
  float scale = 1.0f;
  std::int64_t sliding_window = 0;
};
void check(const AttentionBackwardArgs& args);

}  // namespace flexcore
