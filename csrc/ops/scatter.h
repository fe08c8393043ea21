#pragma once

#include "ops/registry.h"

namespace flexcore {

/// y = 0.
struct ZeroArgs {
  static constexpr std::string_view kName = "zero";
  TensorView y;  // contiguous
};
void check(const ZeroArgs& args);

/// y[index[i]] = x[i]; other rows of y stay.
struct ScatterRowsArgs {
  static constexpr std::string_view kName = "scatter_rows";
  TensorView x;      // [count, width] float32
  TensorView index;  // [count] int32, distinct, in [0, rows)
  TensorView y;      // [rows, width] float32
};
void check(const ScatterRowsArgs& args);

}  // namespace flexcore
