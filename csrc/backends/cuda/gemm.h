#pragma once

#include "flexcore/tensor.h"
#include "ops/context.h"

namespace flexcore::cuda {

/// c (+)= alpha * op(a) op(b) + bias, row-major; sums in float32. a and b share a dtype, float32 or bfloat16.
struct Gemm {
  TensorView a;          // [m, k], or [k, m] with transpose_a
  TensorView b;          // [n, k] with transpose_b (y = x W^T), else [k, n]
  TensorView c;          // [m, n] float32 or bfloat16
  TensorView bias = {};  // [n] in c's dtype, or empty
  float alpha = 1.0f;
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  // c += ...

  std::int64_t m() const { return c.shape(0); }
  std::int64_t n() const { return c.shape(1); }
  std::int64_t k() const { return a.shape(transpose_a ? 0 : 1); }
};

/// Plain GEMMs are the vendor library's (cublaslt.cpp); tests without a GPU have a loop in its place (tests/simt).
/// Throws DeviceError when the library is not there or refuses.
void gemm(OpContext& context, const Gemm& args);

/// The same by a plain kernel: for shapes and alignments that the library refuses.
void simple_gemm(OpContext& context, const Gemm& args);

}  // namespace flexcore::cuda
