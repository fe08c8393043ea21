#pragma once

#include <span>

#include "ops/registry.h"

namespace flexcore {

/// Between the two matrices of a bottleneck adapter; LoRA has none.
enum class Activation : std::uint8_t { kNone, kRelu, kTanh, kGelu, kSilu };

/// One module's LoRA matrices for one adapter, and the rows of the batch that use them.
/// Rows of no segment have no adapter. A segment whose module has no LoRA is left out, or has no rows.
struct LoraSegment {
  std::int64_t begin = 0, end = 0;  // rows of the batch
  const float* lora_a = nullptr;    // [rank, in_features]
  const float* lora_b = nullptr;    // [out_features, rank]
  std::int64_t rank = 0;            // 1..256
  float scaling = 1.0f;             // alpha / rank, or alpha / sqrt(rank)
  float* grad_a = nullptr;          // [rank, in_features], backward only; += always; null: neither is wanted
  float* grad_b = nullptr;          // [out_features, rank], backward only; += always
  Activation activation = Activation::kNone;
};

/// y += scaling * act(x A^T) B^T over the rows of each segment (shrink, then expand). All members read the same x.
/// The rank-r intermediate is float32. A row's result does not depend on the rest of the batch (same bits).
struct LoraArgs {
  static constexpr std::string_view kName = "lora_forward";
  struct Member {
    TensorView y;                           // [num_tokens, out_features] float32 or bfloat16
    std::span<const LoraSegment> segments;  // disjoint row ranges, ascending
  };
  TensorView x;  // [num_tokens, in_features] float32 or bfloat16
  std::span<const Member> members;
};
void check(const LoraArgs& args);

/// With v = x A^T, u = act(v) and du = (grad_y B) * act'(v):  grad_x += scaling * du A,  grad_a += scaling * du^T x,
/// grad_b += scaling * grad_y^T u.
struct LoraBackwardArgs {
  static constexpr std::string_view kName = "lora_backward";
  struct Member {
    TensorView grad_y;  // [num_tokens, out_features] float32 or bfloat16
    std::span<const LoraSegment> segments;
  };
  TensorView x;  // [num_tokens, in_features] float32 or bfloat16
  std::span<const Member> members;
  TensorView grad_x;  // [num_tokens, in_features] float32, always accumulated into; empty: not wanted
};
void check(const LoraBackwardArgs& args);

}  // namespace flexcore
