#include "backends/cpu/kernels/optimizer.h"

#include "backends/cpu/kernels/lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

double sum_squares(const float* x, std::int64_t size) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
#pragma GCC unroll 16
    for (int l = 0; l < kSums; ++l) sums[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
  }
  for (; i < size; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  double total = 0;
  for (int l = 0; l < kSums; ++l) total += sums[l];
  return total;
}

Vec square_root(Vec v) {
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) v[l] = __builtin_sqrtf(v[l]);
  return v;
}

void adamw(const AdamWStep& s, float* param, const float* grad, float* exp_avg, float* exp_avg_sq, std::int64_t size) {
  sweep(0, size, [&](auto block) {
    const Vec g = s.grad_scale * block.get(grad);
    const Vec p = s.decay * block.get(param);
    const Vec m = block.get(exp_avg);
    const Vec m_new = m + s.one_minus_beta1 * (g - m);
    const Vec v_new = s.beta2 * block.get(exp_avg_sq) + s.one_minus_beta2 * g * g;
    const Vec denominator = square_root(v_new) / s.sqrt_correction2 + s.eps;
    block.put(exp_avg, m_new);
    block.put(exp_avg_sq, v_new);
    block.put(param, p - s.step_size * m_new / denominator);
  });
}

void sgd(float learning_rate, float weight_decay, float grad_scale, float* param, const float* grad,
         std::int64_t size) {
  sweep(0, size, [&](auto block) {
    const Vec p = block.get(param);
    block.put(param, p - learning_rate * (grad_scale * block.get(grad) + weight_decay * p));
  });
}

}  // namespace

const OptimizerKernels& optimizer_kernels() {
  static constexpr OptimizerKernels kTable = {sum_squares, adamw, sgd};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
