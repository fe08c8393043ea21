#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// Rows of a matrix or, as the target of a kernel, the rows to write. Strides are in elements.
struct ConstRows {
  const void* data = nullptr;
  std::int64_t stride = 0;
};
struct Rows {
  void* data = nullptr;
  std::int64_t stride = 0;
};

struct RmsNormRows {
  ConstRows x;
  const float* weight;
  Rows y;
  std::int64_t width;
  float eps;
};

struct RmsNormBackwardRows {
  ConstRows grad_y, x;
  const float* weight;
  Rows grad_x;
  std::int64_t width;
  float eps;
  bool accumulate;
};

/// Heads of a token are head_stride apart, tokens `x.stride`.
struct RotaryRows {
  ConstRows x;
  Rows y;
  std::int64_t x_head_stride, y_head_stride, num_heads, half;
  const std::int32_t* positions;
  const float *cos, *sin;
  float sign;  // -1: inverse
};

struct SiluMulRows {
  ConstRows gate, up;
  Rows y;
  std::int64_t width;
};

struct SiluMulBackwardRows {
  ConstRows grad_y, gate, up;
  Rows grad_gate, grad_up;  // null data: not wanted
  std::int64_t width;
};

/// y[i] = x[index[i]], or x[i] without an index.
struct CopyRows {
  ConstRows x;
  const std::int32_t* index;
  Rows y;
  std::int64_t width;
  bool accumulate;
};

/// Each kernel works on the rows [begin, end). Tables are indexed by dtype, 0 float32 and 1 bfloat16, in the order of
/// the struct's tensors.
struct ElementwiseKernels {
  template <class Args>
  using Kernel = void (*)(const Args& args, std::int64_t begin, std::int64_t end);

  Kernel<RmsNormRows> rms_norm[2][2];                         // x, y
  Kernel<RmsNormBackwardRows> rms_norm_backward[2][2][2];     // grad_y, x, grad_x
  Kernel<RotaryRows> rotary[2][2];                            // x, y
  Kernel<SiluMulRows> silu_mul[2][2];                         // gate and up, y
  Kernel<SiluMulBackwardRows> silu_mul_backward[2][2][2][2];  // grad_y, gate and up, grad_gate, grad_up
  Kernel<CopyRows> copy[2][2];                                // x, y
};
FLEXCORE_KERNEL_TABLE(ElementwiseKernels, elementwise_kernels)

}  // namespace flexcore::cpu
