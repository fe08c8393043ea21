#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// u[i, r] = x[i, :] . a[r, :], or += . Both operands run along k.
struct LoraShrink {
  const float* x;  // [rows, k]
  std::int64_t x_stride, rows;
  const float* a;  // [ranks, k]
  std::int64_t a_stride, ranks, k;
  float* u;  // [rows, ranks]
  std::int64_t u_stride;
  bool accumulate;
};

/// y[i, j] += scaling * sum over r of u[i, r] * b(r, j), for columns j in [begin, end).
struct LoraExpand {
  const float* u;  // [rows, rank]
  std::int64_t u_stride, rows, rank;
  const float* b;  // [columns, rank], or [rank, columns] with rows b_stride apart
  std::int64_t b_stride;
  bool b_by_rank;  // the second form
  float scaling;
  void* y;  // [rows, columns]
  std::int64_t y_stride, begin, end;
};

/// grad[r, j] += scaling * sum over rows i of w[i, r] * x[i, j], for columns j in [begin, end).
struct LoraGradient {
  const void* x;  // [rows, columns]
  std::int64_t x_stride, rows;
  const float* w;  // [rows, rank]
  std::int64_t w_stride, rank;
  float scaling;
  float* grad;     // [rank, columns], or [columns, rank]
  bool by_column;  // the second form
  std::int64_t columns, begin, end;
};

/// In all of them an element's bits depend on its own row and column alone.
struct LoraKernels {
  void (*shrink)(const LoraShrink&);
  void (*expand[2])(const LoraExpand&);      // by dtype of y: float32, bfloat16
  void (*gradient[2])(const LoraGradient&);  // by dtype of x
  /// out[r, i] = in[i, r], in [rows, columns] and out [columns, rows] dense.
  void (*transpose)(const float* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns, float* out,
                    std::int64_t out_stride);
  std::int64_t column_step;  // begin of a range of columns is best a multiple of it
};
FLEXCORE_KERNEL_TABLE(LoraKernels, lora_kernels)

}  // namespace flexcore::cpu
