#include "backends/register.h"

namespace flexcore {

OpRegistry make_op_registry() {
  OpRegistry registry;
  register_cpu_kernels(registry);
  register_cuda_kernels(registry);
  return registry;
}

}  // namespace flexcore
