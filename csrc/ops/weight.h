#pragma once

#include <cstddef>
#include <string_view>

#include "ops/registry.h"

namespace flexcore {

/// How a frozen matrix is stored: dense, in the dtype it is computed in, or as codes of 8 or 4 bits for groups of
/// neighbours along in_features, the last of which may be short. Wherever a quantised weight is read, it is worth
/// min + code * scale (int8, int4: the group's minimum and a part of its range, bfloat16 both; FlexGen, arXiv
/// 2303.06865, section 4) or kNf4Levels[code] * absmax (nf4: float32; QLoRA, arXiv 2305.14314), rounded to the dtype
/// that it is computed in.
struct WeightFormat {
  enum class Kind : std::uint8_t { kDense, kInt8, kInt4, kNf4 };
  Kind kind = Kind::kDense;
  std::int64_t group_size = 64;  // in_features that share parameters; a multiple of 16

  bool quantized() const { return kind != Kind::kDense; }
  std::int64_t bits() const { return kind == Kind::kInt8 ? 8 : 4; }  // of a code
  std::int64_t groups(std::int64_t in_features) const { return (in_features + group_size - 1) / group_size; }
  bool operator==(const WeightFormat&) const = default;
};
inline constexpr std::int64_t kGroupMultiple = 16, kMostGroupSize = 4096;

/// A frozen matrix [out_features, in_features], row-major or in the layout that the backend packed it into.
struct WeightView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // that products are computed in; of a dense matrix, that of its elements
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  bool packed = false;
  WeightFormat format = {};  // quantised ones are packed

  TensorView plain() const;  // [out_features, in_features]; throws when packed
};

/// Lays a row-major matrix out for the backend's GEMMs. The one packed copy serves y = x W^T, dx = dy W and row
/// look-up.
struct PackWeightArgs {
  static constexpr std::string_view kName = "pack_weight";
  TensorView source;       // [out_features, in_features] float32, bfloat16 or float16
  DType dtype;             // that products are computed in: float32 or bfloat16
  void* packed = nullptr;  // packed_weight_bytes(...) bytes
  WeightFormat format = {};
  bool on_device = false;  // source is in the device's memory, rows next to each other; else in the host's
};
void check(const PackWeightArgs& args);

/// Size of the packed layout.
struct PackedWeightBytesArgs {
  static constexpr std::string_view kName = "packed_weight_bytes";
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  DType dtype = DType::kFloat32;
  std::size_t* bytes = nullptr;  // result
  WeightFormat format = {};
};
void check(const PackedWeightBytesArgs& args);

}  // namespace flexcore
