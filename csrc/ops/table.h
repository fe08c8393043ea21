#pragma once

#include "ops/registry.h"

namespace flexcore {

/// Numbers by token: that of a token and a column is at data[token * token_stride + column * column_stride]. A whole
/// embedding [num_tokens, width], or the A of a LoRA at one, [rank, num_tokens].
struct TokenTable {
  float* data = nullptr;
  std::int64_t num_tokens = 0, width = 0;
  std::int64_t token_stride = 0, column_stride = 1;
};

/// y[i] = table[token_ids[i]].
struct TableLookUpArgs {
  static constexpr std::string_view kName = "table_look_up";
  TensorView token_ids;  // [rows] int32, in [0, num_tokens)
  TokenTable table;
  TensorView y;  // [rows, width] float32
};
void check(const TableLookUpArgs& args);

/// table[token_ids[i]] += x[i]; rows with the same token are added in their order.
struct TableAddArgs {
  static constexpr std::string_view kName = "table_add";
  TensorView token_ids;  // [rows] int32, in [0, num_tokens)
  TensorView x;          // [rows, width] float32
  TokenTable table;
};
void check(const TableAddArgs& args);

}  // namespace flexcore
