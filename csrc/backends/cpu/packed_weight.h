#pragma once

#include "backends/cpu/kernels/gemm.h"
#include "backends/cpu/kernels/quantized.h"
#include "ops/weight.h"

namespace flexcore::cpu {

/// How kernels name a dtype: float32, bfloat16 or float16.
Element element(DType dtype);

/// in_features as stored: even for bfloat16, whose panels hold pairs.
std::int64_t packed_depth(DType dtype, std::int64_t in_features);

/// Of a quantised weight.
QuantizedLayout quantized_layout(const WeightFormat& format, std::int64_t in_features);

/// From a panel of a packed weight to the next.
std::int64_t panel_bytes(const WeightFormat& format, DType dtype, std::int64_t in_features);

/// Rows [begin, end) of a weight, without a copy. Of a packed one, `begin` is a multiple of kPanelRows.
WeightView weight_rows(const WeightView& weight, std::int64_t begin, std::int64_t end);

/// pack_weight, packed_weight_bytes, embedding; called by register_linear.
void register_packed_weight(OpRegistry& registry);

}  // namespace flexcore::cpu
