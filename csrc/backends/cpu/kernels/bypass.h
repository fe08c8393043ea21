#pragma once

#include <cstdint>

#include "backends/cpu/kernels/elementwise.h"

namespace flexcore::cpu {

/// y = offset + scale * (x - offset).
struct ScaleRows {
  ConstRows x;
  Rows y;
  const float* scale;
  const float* offset;  // null: 0
  std::int64_t width;
};

/// grad_scale += (sum over rows of grad_y * (x - offset)) / divisor.
struct ScaleGradient {
  ConstRows grad_y, x;
  std::int64_t rows;
  const float* offset;   // null: 0
  const float* divisor;  // null: 1
  float* grad_scale;
};

/// y (+)= x / (1 - p) where it is kept; numbers as in ops/dropout.h.
struct DropoutRows {
  ConstRows x;
  Rows y;
  std::int64_t width;
  std::uint32_t threshold;  // numbers below it drop
  float kept, dropped;      // factors
  std::uint32_t key[2];
  std::uint32_t position, module, sequence;  // position of row 0
  bool accumulate;
};

/// norm[i] = Euclidean norm of row i.
struct NormRows {
  const float* x;
  std::int64_t stride, width;
  float* norm;
};

/// Tables are indexed by dtype, 0 float32 and 1 bfloat16.
struct BypassKernels {
  template <class Args>
  using Kernel = ElementwiseKernels::Kernel<Args>;

  Kernel<ScaleRows> scale[2][2];               // x, y; rows [begin, end)
  Kernel<ScaleGradient> scale_gradient[2][2];  // grad_y, x; columns [begin, end)
  Kernel<DropoutRows> dropout[2][2];           // x, y; rows
  Kernel<NormRows> norm;                       // rows
};
FLEXCORE_KERNEL_TABLE(BypassKernels, bypass_kernels)

}  // namespace flexcore::cpu
