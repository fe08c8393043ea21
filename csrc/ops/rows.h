#pragma once

#include "ops/weight.h"

namespace flexcore {

/// y[i] = weight[token_ids[i]].
struct EmbeddingArgs {
  static constexpr std::string_view kName = "embedding";
  TensorView token_ids;  // [num_tokens] int32, in [0, out_features)
  WeightView weight;     // [vocab_size, hidden_size], packed or not
  TensorView y;          // [num_tokens, hidden_size] float32 or bfloat16
};
void check(const EmbeddingArgs& args);

/// y[i] = x[index[i]].
struct GatherRowsArgs {
  static constexpr std::string_view kName = "gather_rows";
  TensorView x;      // [rows, width] float32 or bfloat16
  TensorView index;  // [count] int32
  TensorView y;      // [count, width], converted to its own dtype
};
void check(const GatherRowsArgs& args);

/// y = x or y += x, with conversion between float32 and bfloat16. Rows may be strided.
struct CopyArgs {
  static constexpr std::string_view kName = "copy";
  TensorView x;  // [rows, width]
  TensorView y;  // [rows, width]
  GradMode mode = GradMode::kWrite;
};
void check(const CopyArgs& args);

}  // namespace flexcore
