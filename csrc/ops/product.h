#pragma once

#include "ops/registry.h"

namespace flexcore {

/// c (+)= alpha * op(a) op(b), op(x) = x or its transpose: what trains whole matrices. Rows may be strided.
struct ProductArgs {
  static constexpr std::string_view kName = "product";
  TensorView a;  // [m, k], or [k, m] with transpose_a; float32
  TensorView b;  // [k, n], or [n, k] with transpose_b; float32
  TensorView c;  // [m, n] float32
  float alpha = 1.0f;
  bool transpose_a = false, transpose_b = false;
  GradMode mode = GradMode::kWrite;

  std::int64_t rows() const { return a.shape(transpose_a ? 1 : 0); }
  std::int64_t columns() const { return b.shape(transpose_b ? 0 : 1); }
  std::int64_t depth() const { return a.shape(transpose_a ? 0 : 1); }
};
void check(const ProductArgs& args);

}  // namespace flexcore
