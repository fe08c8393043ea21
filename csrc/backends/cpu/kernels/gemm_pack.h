#pragma once

#include "backends/cpu/kernels/gemm.h"

namespace flexcore::cpu::FLEXCORE_ISA {

void pack_panels(const PackPanels& args);
void convert_rows(const ConvertRows& args);
void transpose_panels(const TransposePanels& args);
void widen_lines(const WidenLines& args);
void gather_weight_rows(const GatherWeightRows& args);

}  // namespace flexcore::cpu::FLEXCORE_ISA
