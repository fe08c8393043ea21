#pragma once

#include <cstddef>
#include <string_view>

#include "ops/registry.h"

namespace flexcore {

/// A frozen matrix [out_features, in_features], row-major or in the layout that the backend packed it into.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  bool packed = false;

  TensorView plain() const;  // [out_features, in_features]; throws when packed
};

/// Lays a row-major matrix out for the backend's GEMMs. The one packed copy serves y = x W^T, dx = dy W and row
/// look-up.
struct PackWeightArgs {
  static constexpr std::string_view kName = "pack_weight";
  TensorView source;       // [out_features, in_features] float32, bfloat16 or float16, in host memory
  DType dtype;             // of the packed matrix: float32 or bfloat16
  void* packed = nullptr;  // packed_weight_bytes(...) bytes
};
void check(const PackWeightArgs& args);

/// Size of the packed layout.
struct PackedWeightBytesArgs {
  static constexpr std::string_view kName = "packed_weight_bytes";
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  DType dtype = DType::kFloat32;
  std::size_t* bytes = nullptr;  // result
};
void check(const PackedWeightBytesArgs& args);

}  // namespace flexcore
