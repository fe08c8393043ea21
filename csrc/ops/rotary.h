#pragma once

#include "ops/registry.h"

namespace flexcore {

/// Rotary position embedding, "half" layout (Llama, Hugging Face): pairs (i, i + head_dim / 2).
/// The inverse rotation (sine negated) is its gradient.
struct RotaryArgs {
  static constexpr std::string_view kName = "rotary";
  TensorView x;          // [num_tokens, num_heads, head_dim] float32 or bfloat16
  TensorView y;          // like x in shape, float32 or bfloat16; may be x
  TensorView positions;  // [num_tokens] int32, in [0, max_positions)
  TensorView cos;        // [max_positions, head_dim / 2] float32
  TensorView sin;        // [max_positions, head_dim / 2] float32
  bool inverse = false;
};
void check(const RotaryArgs& args);

}  // namespace flexcore
