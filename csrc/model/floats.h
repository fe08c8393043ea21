#pragma once

#include <cstdint>

#include "flexcore/tensor.h"

namespace flexcore {

// Numbers as they lie in a weight file: float32, bfloat16 or float16 at any byte. Other dtypes are InvalidArgument.

/// Whether elements [begin, end) of `source` are finite, and stay so when rounded to `target`.
bool all_finite(const TensorView& source, std::int64_t begin, std::int64_t end, DType target);

/// out[0 .. source.size()) = source.
void to_float32(const TensorView& source, float* out);

}  // namespace flexcore
