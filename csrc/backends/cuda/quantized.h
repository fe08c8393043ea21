#pragma once

#include "ops/context.h"
#include "ops/weight.h"

// Weights of 8 and 4 bits on the device; linear.cu decides where they go.
namespace flexcore::cuda {

/// Rows that quantized_product takes.
inline constexpr std::int64_t kFewRows = 8;

/// Bytes of a row in its packed form, quantised or dense.
std::int64_t packed_row_bytes(const WeightFormat& format, DType dtype, std::int64_t in_features);

/// Quantises rows of the device's memory, dense; float16 too.
void quantize(OpContext& context, const TensorView& source, const WeightFormat& format, void* packed);

/// y[i] = row i of the weight, or row index[i].
void dequantize(OpContext& context, const WeightView& weight, const TensorView& y, const std::int32_t* index = nullptr);

/// y (+)= x W^T + bias for at most kFewRows rows; x in the weight's dtype, the bias in y's or empty.
void quantized_product(OpContext& context, const TensorView& x, const WeightView& weight, const TensorView& y,
                       const TensorView& bias, bool accumulate);

}  // namespace flexcore::cuda
