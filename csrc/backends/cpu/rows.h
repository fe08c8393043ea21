#pragma once

#include <algorithm>

#include "backends/cpu/kernels/elementwise.h"
#include "flexcore/tensor.h"

// Tensors as the kernels of rows take them.
namespace flexcore::cpu {

inline int type_index(DType dtype) { return dtype == DType::kBFloat16 ? 1 : 0; }
inline int type_index(const TensorView& t) { return type_index(t.dtype()); }
inline ConstRows in(const TensorView& t) { return {t.data(), t.stride(0)}; }
inline Rows out(const TensorView& t) { return {t.data(), t.stride(0)}; }

/// Rows of `width` elements that are worth a part of a parallel region, which costs about as much as 16,384 elements.
inline std::int64_t grain(std::int64_t width) {
  return std::max<std::int64_t>(16384 / std::max<std::int64_t>(width, 1), 1);
}

}  // namespace flexcore::cpu
