#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// One step's constants, worked out in double and rounded once, as torch.optim does with Python's numbers.
struct AdamWStep {
  float grad_scale;
  float decay;  // 1 - learning_rate * weight_decay
  float one_minus_beta1, beta2, one_minus_beta2;
  float sqrt_correction2;  // sqrt(1 - beta2^step)
  float eps;
  float step_size;  // learning_rate / (1 - beta1^step)
};

struct OptimizerKernels {
  /// Sum of squares, the order fixed by `size`.
  double (*sum_squares)(const float* x, std::int64_t size);
  void (*adamw)(const AdamWStep& step, float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                std::int64_t size);
  /// param -= learning_rate * (grad_scale * grad + weight_decay * param)
  void (*sgd)(float learning_rate, float weight_decay, float grad_scale, float* param, const float* grad,
              std::int64_t size);
};
FLEXCORE_KERNEL_TABLE(OptimizerKernels, optimizer_kernels)

}  // namespace flexcore::cpu
