#pragma once

#include "backends/cpu/kernels/gemm.h"
#include "core/bfloat16.h"

namespace flexcore::cpu::FLEXCORE_ISA {

/// As it lies in a checkpoint.
struct float16 {
  std::uint16_t bits;
};

FLEXCORE_INLINE float to_float(float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinity and NaN get the exponent of all ones.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, scaled) | (magnitude >= 0x7c00u ? 0x7f800000u : 0u);
  return __builtin_bit_cast(float, bits | sign);
}
using flexcore::to_float;

void pack_panels(const PackPanels& args);
void convert_rows(const ConvertRows& args);
void transpose_panels(const TransposePanels& args);
void widen_lines(const WidenLines& args);
void gather_weight_rows(const GatherWeightRows& args);

}  // namespace flexcore::cpu::FLEXCORE_ISA
