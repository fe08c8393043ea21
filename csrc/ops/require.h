#pragma once

#include <initializer_list>
#include <string_view>

#include "core/check.h"
#include "ops/weight.h"

namespace flexcore {

// What the checks of the op families share. Messages read "rms_norm: y is bfloat16 [3, 576], wanted [3, 512]".

/// The extents are `shape`; memory is there unless the tensor has no elements.
inline void require_shape(std::string_view op, std::string_view name, const TensorView& t,
                          std::initializer_list<std::int64_t> shape) {
  bool same = t.ndim() == static_cast<int>(shape.size());
  std::int64_t elements = 1;
  int d = 0;
  for (const auto extent : shape) {
    same = same && t.shape(d++) == extent;
    elements *= extent;
  }
  if (!same) [[unlikely]] {
    std::string wanted;
    for (const auto extent : shape) wanted += str(wanted.empty() ? "" : ", ", extent);
    throw InvalidArgument(str(op, ": ", name, " is ", t, ", wanted [", wanted, "]"));
  }
  require(elements == 0 || t.data() != nullptr, op, ": ", name, " is ", t, " without memory");
}

inline void require_dtype(std::string_view op, std::string_view name, const TensorView& t, DType dtype) {
  require(t.dtype() == dtype, op, ": ", name, " is ", t, ", wanted ", dtype_name(dtype));
}

/// float32 or bfloat16, and the elements of a row side by side.
inline void require_float_rows(std::string_view op, std::string_view name, const TensorView& t) {
  require(t.dtype() == DType::kFloat32 || t.dtype() == DType::kBFloat16, op, ": ", name, " is ", t,
          ", wanted float32 or bfloat16");
  const int last = t.ndim() - 1;
  require(last < 0 || t.shape(last) <= 1 || t.stride(last) == 1, op, ": ", name, " has stride ",
          last < 0 ? 0 : t.stride(last), " in its last dimension, wanted 1");
}

inline void require_contiguous(std::string_view op, std::string_view name, const TensorView& t) {
  require(t.contiguous(), op, ": ", name, " is ", t, " with gaps, wanted contiguous");
}

/// A matrix of float rows.
inline void require_matrix(std::string_view op, std::string_view name, const TensorView& t) {
  require(t.ndim() == 2, op, ": ", name, " is ", t, ", wanted two dimensions");
  require_float_rows(op, name, t);
  require_shape(op, name, t, {t.shape(0), t.shape(1)});
}

/// A matrix of float rows with this shape.
inline void require_matrix(std::string_view op, std::string_view name, const TensorView& t, std::int64_t rows,
                           std::int64_t width) {
  require_shape(op, name, t, {rows, width});
  require_float_rows(op, name, t);
}

/// A float32 vector, dense.
inline void require_vector(std::string_view op, std::string_view name, const TensorView& t, std::int64_t size,
                           DType dtype = DType::kFloat32) {
  require_shape(op, name, t, {size});
  require_dtype(op, name, t, dtype);
  require_contiguous(op, name, t);
}

/// float32 or bfloat16, and there. Plain or packed: the backend knows.
inline void require_weight(std::string_view op, std::string_view name, const WeightView& w) {
  require(w.dtype == DType::kFloat32 || w.dtype == DType::kBFloat16, op, ": ", name, " is ", dtype_name(w.dtype),
          ", wanted float32 or bfloat16");
  require(w.out_features > 0 && w.in_features > 0 && w.data != nullptr, op, ": ", name, " is [", w.out_features, ", ",
          w.in_features, "]", w.data == nullptr ? " without memory" : ", wanted at least one element");
  require(w.packed || !w.format.quantized(), op, ": ", name, " is quantised and not packed, wanted a packed one");
}

}  // namespace flexcore
