#pragma once

#include "core/bfloat16.h"
#include "core/check.h"

namespace flexcore {

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls `f(TypeTag<T>{})` with the C++ type of a computing dtype: float or bfloat16.
template <class F>
decltype(auto) dispatch_float(DType dtype, std::string_view op, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kBFloat16:
      return f(TypeTag<bfloat16>{});
    default:
      throw Unsupported(str(op, ": dtype ", dtype_name(dtype), ", wanted float32 or bfloat16"));
  }
}

}  // namespace flexcore
