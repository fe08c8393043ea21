#pragma once

#include "ops/registry.h"

namespace flexcore {

/// y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension. Heads are normalised by passing [num_tokens *
/// num_heads, head_dim].
struct RmsNormArgs {
  static constexpr std::string_view kName = "rms_norm";
  TensorView x;       // [rows, width] float32 or bfloat16
  TensorView weight;  // [width] float32
  TensorView y;       // [rows, width] float32 or bfloat16; may be x
  float eps = 1e-5f;
};
void check(const RmsNormArgs& args);

/// grad_x (+)= r * (g - n * mean(g * n)), with n = x r, r = 1 / rms(x), g = grad_y * weight.
struct RmsNormBackwardArgs {
  static constexpr std::string_view kName = "rms_norm_backward";
  TensorView grad_y;  // [rows, width] float32 or bfloat16
  TensorView x;       // [rows, width] float32 or bfloat16
  TensorView weight;  // [width] float32
  TensorView grad_x;  // [rows, width] float32 or bfloat16; may be grad_y when written
  float eps = 1e-5f;
  GradMode mode = GradMode::kWrite;
};
void check(const RmsNormBackwardArgs& args);

}  // namespace flexcore
