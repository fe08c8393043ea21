#pragma once

#include <span>

#include "ops/registry.h"

namespace flexcore {

/// A vector that scales columns, and the rows of the batch that it scales.
struct ScaleSegment {
  std::int64_t begin = 0, end = 0;      // rows of the batch
  const float* scale = nullptr;         // [width]
  const float* offset = nullptr;        // [width], what is not scaled; null: 0
  float* grad_scale = nullptr;          // [width], backward only; += always
  const float* grad_divisor = nullptr;  // [width], of the sums that grad_scale receives; null: 1
};

/// y = offset + scale * (x - offset) in the rows of the segments, y = x in all others.
struct ScaleArgs {
  static constexpr std::string_view kName = "scale";
  TensorView x;                            // [num_tokens, width] float32 or bfloat16
  TensorView y;                            // like x; may be x
  std::span<const ScaleSegment> segments;  // disjoint row ranges, ascending
};
void check(const ScaleArgs& args);

/// grad_x = scale * grad_y in the rows of the segments, grad_y in all others; grad_scale += (sum over rows of grad_y *
/// (x - offset)) / grad_divisor, undivided where that is 0.
struct ScaleBackwardArgs {
  static constexpr std::string_view kName = "scale_backward";
  TensorView grad_y;  // [num_tokens, width] float32 or bfloat16
  TensorView x;       // like grad_y in shape, float32 or bfloat16
  std::span<const ScaleSegment> segments;
  TensorView grad_x;  // like grad_y, not its memory; empty: not wanted
};
void check(const ScaleBackwardArgs& args);

}  // namespace flexcore
