#pragma once

#include <span>

#include "ops/registry.h"

namespace flexcore {

/// y = 0.
struct ZeroArgs {
  static constexpr std::string_view kName = "zero";
  TensorView y;  // contiguous
};
void check(const ZeroArgs& args);

/// y[index[i]] = x[i]; other rows of y stay.
struct ScatterRowsArgs {
  static constexpr std::string_view kName = "scatter_rows";
  TensorView x;      // [count, width] float32
  TensorView index;  // [count] int32, distinct, in [0, rows)
  TensorView y;      // [rows, width] float32
};
void check(const ScatterRowsArgs& args);

/// Consecutive tokens of a sequence in a batch, and the store that keeps tensors of theirs at the tokens' absolute
/// depth.
struct SaveSpan {
  std::int64_t row_begin = 0, row_end = 0;  // rows of the batch
  std::byte* store = nullptr;               // tensor after tensor, each [length, width]
  std::int64_t length = 0;                  // tokens of the sequence
  std::int64_t position = 0;                // of the first row
};

/// Bytes of a kept row of `width` elements. kUInt8: codes in groups of 64 (kGroupWidth), one byte an element, then a
/// bfloat16 minimum and step for each group; x ~ minimum + code * step. The minimum is rounded down and the step up, so
/// that no element is clipped and none is off by more than half a step. Padded to 16 bytes.
inline constexpr std::int64_t kGroupWidth = 64;
std::int64_t kept_row_bytes(DType dtype, std::int64_t width);

/// Row i of a span's rows becomes row position + i of the tensor that begins offset * length bytes into its store.
struct SaveRowsArgs {
  static constexpr std::string_view kName = "save_rows";
  TensorView x;                     // [num_tokens, width] float32 or bfloat16
  std::span<const SaveSpan> spans;  // of distinct rows
  DType dtype = DType::kFloat32;    // of the tensor that is kept: float32, bfloat16, or uint8 for codes in groups
  std::size_t offset = 0;           // bytes a token of the tensors before it
};
void check(const SaveRowsArgs& args);

/// The way back from codes in groups.
struct LoadRowsArgs {
  static constexpr std::string_view kName = "load_rows";
  TensorView x;  // [rows, kept_row_bytes] uint8
  TensorView y;  // [rows, width] float32 or bfloat16
};
void check(const LoadRowsArgs& args);

}  // namespace flexcore
