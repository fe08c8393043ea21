#include "backends/cuda/families.h"
#include "backends/register.h"

namespace flexcore {

void register_cuda_kernels(OpRegistry& registry) { cuda::register_elementwise(registry); }

}  // namespace flexcore
