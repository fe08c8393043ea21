#pragma once

#include "backends/cuda/context.h"
#include "backends/cuda/kernels/rows.cuh"

// Tensors as kernels take them.
namespace flexcore::cuda {

inline Rows rows_of(const TensorView& t) { return {t.data(), t.stride(0), t.dtype() == DType::kBFloat16}; }

/// Whether every row of every tensor can be read and written in packs.
template <class... Tensors>
bool all_packs(std::int64_t width, const Tensors&... tensors) {
  return (packs_of(rows_of(tensors), width) && ...);
}
/// The same for a contiguous array.
inline bool aligned_for_packs(const TensorView& t) { return reinterpret_cast<std::uintptr_t>(t.data()) % 16 == 0; }

}  // namespace flexcore::cuda
