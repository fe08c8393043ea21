#pragma once

#include "flexcore/tensor.h"
#include "ops/context.h"

namespace flexcore::cuda {

/// c (+)= a op(b) + bias, row-major; sums in float32. a and b share a dtype, float32 or bfloat16.
struct Gemm {
  TensorView a;          // [m, k]
  TensorView b;          // [n, k] with transpose_b (y = x W^T), else [k, n]
  TensorView c;          // [m, n] float32 or bfloat16
  TensorView bias = {};  // [n] in c's dtype, or empty
  bool transpose_b = false;
  bool accumulate = false;  // c += ...
};

/// Plain GEMMs are the vendor library's (cublaslt.cpp); tests without a GPU have a loop in its place (tests/simt).
/// Throws DeviceError when the library is not there or refuses.
void gemm(OpContext& context, const Gemm& args);

/// The same by a plain kernel: for shapes and alignments that the library refuses.
void simple_gemm(OpContext& context, const Gemm& args);

}  // namespace flexcore::cuda
