#pragma once

#include "ops/registry.h"

namespace flexcore {

/// y = silu(gate) * up.
struct SiluMulArgs {
  static constexpr std::string_view kName = "silu_mul";
  TensorView gate;  // [num_tokens, intermediate_size] float32 or bfloat16
  TensorView up;    // like gate
  TensorView y;     // like gate in shape, float32 or bfloat16
};
void check(const SiluMulArgs& args);

/// grad_up = grad_y * silu(gate); grad_gate = grad_y * up * s * (1 + gate * (1 - s)), s = sigmoid(gate). Either output
/// may be empty.
struct SiluMulBackwardArgs {
  static constexpr std::string_view kName = "silu_mul_backward";
  TensorView grad_y;     // [num_tokens, intermediate_size] float32 or bfloat16
  TensorView gate;       // like grad_y in shape, float32 or bfloat16
  TensorView up;         // like gate
  TensorView grad_gate;  // like gate in shape, float32 or bfloat16; empty: not wanted
  TensorView grad_up;    // like gate in shape, float32 or bfloat16; empty: not wanted
};
void check(const SiluMulBackwardArgs& args);

}  // namespace flexcore
