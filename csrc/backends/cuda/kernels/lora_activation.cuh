#pragma once

#include "backends/cuda/kernels/lora_gradient.cuh"

namespace flexcore::cuda {

inline constexpr int kActivationThreads = 256;

/// Grid: (blocks of the longest, pieces). Floor: 8 bytes an element, or 16.
__global__ void __launch_bounds__(kActivationThreads) lora_activation_kernel(const LoraActivation* all) {
  const LoraActivation a = all[blockIdx.y];
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kActivationThreads + threadIdx.x;
  if (i >= a.size) return;
  const float v = a.u[i];
  float value = v, slope = 1.0f;
  if (a.activation == 1) {
    value = v > 0.0f ? v : 0.0f;
    slope = v > 0.0f ? 1.0f : 0.0f;
  } else if (a.activation == 2) {
    value = tanhf(v);
    slope = 1.0f - value * value;
  } else if (a.activation == 3) {
    const float half = 0.5f * (1.0f + erff(v * 0.70710678f));
    value = v * half;
    slope = half + v * 0.39894228f * expf(-0.5f * v * v);
  } else if (a.activation == 4) {
    const float s = 1.0f / (1.0f + expf(-v));
    value = v * s;
    slope = s * (1.0f + v * (1.0f - s));
  }
  if (a.grad_u != nullptr) a.grad_u[i] *= slope;
  a.u[i] = value;
}

inline void launch_lora_activation(const LoraActivation* all, std::size_t count, std::int64_t most_size,
                                   cudaStream_t stream) {
  constexpr std::size_t kMost = 65535;  // blockIdx.y
  for (std::size_t first = 0; first < count && most_size > 0; first += kMost)
    launch(lora_activation_kernel,
           dim3(static_cast<unsigned>((most_size + kActivationThreads - 1) / kActivationThreads),
                static_cast<unsigned>(count - first < kMost ? count - first : kMost)),
           dim3(kActivationThreads), 0, stream, all + first);
}

}  // namespace flexcore::cuda
