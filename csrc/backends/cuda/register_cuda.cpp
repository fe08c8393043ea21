#include "backends/cuda/families.h"
#include "backends/register.h"

namespace flexcore {

void register_cuda_kernels(OpRegistry& registry) {
  cuda::register_elementwise(registry);
  cuda::register_attention(registry);
  cuda::register_linear(registry);
  cuda::register_lora(registry);
  cuda::register_bypass(registry);
  cuda::register_cross_entropy(registry);
  cuda::register_sampling(registry);
  cuda::register_product(registry);
  cuda::register_optimizer(registry);
  cuda::register_transfer(registry);
}

}  // namespace flexcore
