#pragma once

#include <span>

#include "ops/weight.h"

namespace flexcore {

/// y = x W^T + bias, for every member; all members read the same x in one pass.
/// A row's result does not depend on which other rows are in the batch (same bits); on CUDA, of quantised weights, only
/// on whether there are more than a few of them.
struct LinearArgs {
  static constexpr std::string_view kName = "linear";
  struct Member {
    WeightView weight;                 // [out_features, in_features]
    TensorView bias;                   // [out_features] float32, or empty
    TensorView y;                      // [num_tokens, out_features] float32 or bfloat16
    GradMode mode = GradMode::kWrite;  // kAccumulate: y += ... (residual add)
  };
  TensorView x;  // [num_tokens, in_features] float32 or bfloat16; converted to the weight's dtype
  std::span<const Member> members;
};
void check(const LinearArgs& args);

/// grad_x (+)= sum over members of grad_y W. Frozen weights get no gradient.
struct LinearBackwardArgs {
  static constexpr std::string_view kName = "linear_backward";
  struct Member {
    WeightView weight;  // [out_features, in_features]
    TensorView grad_y;  // [num_tokens, out_features] float32 or bfloat16; converted to the weight's dtype
  };
  std::span<const Member> members;
  TensorView grad_x;  // [num_tokens, in_features] float32
  GradMode mode = GradMode::kWrite;
};
void check(const LinearBackwardArgs& args);

}  // namespace flexcore
