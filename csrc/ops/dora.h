#pragma once

#include "ops/weight.h"

namespace flexcore {

/// What DoRA (arXiv 2402.09353, equation 5) scales the rows of W + scaling * B A with: norm[i] is the Euclidean norm of
/// row i, scale = magnitude / norm, and 0 where the norm is 0.
struct DoraScaleArgs {
  static constexpr std::string_view kName = "dora_scale";
  WeightView weight;              // [out_features, in_features]
  const float* lora_a = nullptr;  // [rank, in_features]
  const float* lora_b = nullptr;  // [out_features, rank]
  std::int64_t rank = 0;          // 1..256
  float scaling = 1.0f;
  const float* magnitude = nullptr;  // [out_features]; null: the norm itself
  TensorView norm;                   // [out_features] float32
  TensorView scale;                  // [out_features] float32
};
void check(const DoraScaleArgs& args);

}  // namespace flexcore
