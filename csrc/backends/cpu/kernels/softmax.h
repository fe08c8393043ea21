#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// Softmax denominator of what has been seen of a row: sum of exp(x - max).
struct SoftmaxState {
  float max = -__builtin_inff();
  double sum = 0;
};

/// A whole row. `sum` is NaN when the row has NaN, +infinity, or nothing but -infinity.
struct RowPeak {
  float max;
  double sum;
  std::int32_t argmax;  // the lowest id among equals
};

struct SoftmaxKernels {
  /// Takes in a chunk of a row and writes e = exp(x - new max), float32 or bfloat16, unless `e` is null. Returns
  /// exp(old max - new max), by which everything scaled with the old maximum is to be multiplied.
  float (*absorb[2])(const float* x, std::int64_t size, SoftmaxState* state, void* e);
  void (*scale)(float* x, std::int64_t size, float factor);
  /// out = scale * (sum * inverse - row), float32 or bfloat16.
  void (*finish_gradient[2])(const float* sum, const float* row, std::int64_t size, float inverse, float scale,
                             void* out);
  RowPeak (*peak)(const float* x, std::int64_t size);
  /// The maximum of each run of 32 floats, the last one shorter; NaN is not looked for. Returns how many.
  std::int64_t (*block_maxima)(const float* x, std::int64_t size, float* maxima);
  /// Values >= threshold and where they are, ascending; the room is for all. Returns how many.
  std::int64_t (*collect)(const float* x, std::int64_t size, float threshold, float* values, std::int32_t* ids);
  /// p = exp((x - max) * inverse_temperature); returns their sum.
  double (*exponentials)(const float* x, std::int64_t size, float max, float inverse_temperature, float* p);
};
FLEXCORE_KERNEL_TABLE(SoftmaxKernels, softmax_kernels)

}  // namespace flexcore::cpu
