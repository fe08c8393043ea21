#pragma once

#include <cstdint>

#include "backends/cpu/kernels/elementwise.h"

namespace flexcore::cpu {

/// Elements that share a minimum and a step: ops/scatter.h's kGroupWidth.
inline constexpr std::int64_t kCodeGroup = 64;

/// Rows of floats and rows of codes (ops/scatter.h), `stride` bytes apart.
struct QuantizeRows {
  ConstRows x;
  std::uint8_t* codes;
  std::int64_t stride, width;
};
struct DequantizeRows {
  const std::uint8_t* codes;
  std::int64_t stride, width;
  Rows y;
};

/// By dtype of the floats: float32, bfloat16. Rows [begin, end).
struct Groups8Kernels {
  ElementwiseKernels::Kernel<QuantizeRows> quantize[2];
  ElementwiseKernels::Kernel<DequantizeRows> dequantize[2];
};
FLEXCORE_KERNEL_TABLE(Groups8Kernels, groups8_kernels)

}  // namespace flexcore::cpu
