#include "backends/cpu/families.h"
#include "backends/register.h"

namespace flexcore {

void register_cpu_kernels(OpRegistry& registry) {
  cpu::register_linear(registry);
  cpu::register_lora(registry);
  cpu::register_bypass(registry);
  cpu::register_attention(registry);
  cpu::register_elementwise(registry);
  cpu::register_cross_entropy(registry);
  cpu::register_product(registry);
  cpu::register_optimizer(registry);
  cpu::register_scatter(registry);
  cpu::register_sampling(registry);
  cpu::register_transfer(registry);
}

}  // namespace flexcore
