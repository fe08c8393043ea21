#pragma once

#include <span>

#include "ops/registry.h"

namespace flexcore {

/// result = sum of squares of all elements of all tensors, in double, in an order that does not depend on the number of
/// threads.
struct SumSquaresArgs {
  static constexpr std::string_view kName = "sum_squares";
  std::span<const TensorView> tensors;  // float32, contiguous
  double* result = nullptr;
};
void check(const SumSquaresArgs& args);

/// Multi-tensor AdamW (decoupled weight decay; torch.optim.AdamW's formula). `step` counts from 1. Gradients are
/// multiplied by grad_scale first (clipping).
struct AdamWArgs {
  static constexpr std::string_view kName = "adamw";
  struct Tensor {
    float* param = nullptr;
    const float* grad = nullptr;
    float* exp_avg = nullptr;
    float* exp_avg_sq = nullptr;
    std::int64_t size = 0;
  };
  std::span<const Tensor> tensors;
  std::int64_t step = 1;
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0, grad_scale = 1;
};
void check(const AdamWArgs& args);

/// Multi-tensor SGD with L2 weight decay and no momentum: param -= learning_rate * (grad_scale * grad + weight_decay *
/// param).
struct SgdArgs {
  static constexpr std::string_view kName = "sgd";
  struct Tensor {
    float* param = nullptr;
    const float* grad = nullptr;
    std::int64_t size = 0;
  };
  std::span<const Tensor> tensors;
  double learning_rate = 0, weight_decay = 0, grad_scale = 1;
};
void check(const SgdArgs& args);

}  // namespace flexcore
