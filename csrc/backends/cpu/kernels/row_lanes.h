#pragma once

#include "backends/cpu/kernels/elementwise.h"
#include "backends/cpu/kernels/lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

/// Row i.
template <class T>
FLEXCORE_INLINE const T* row(ConstRows m, std::int64_t i) {
  return static_cast<const T*>(m.data) + i * m.stride;
}
template <class T>
FLEXCORE_INLINE T* row(Rows m, std::int64_t i) {
  return static_cast<T*>(m.data) + i * m.stride;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
