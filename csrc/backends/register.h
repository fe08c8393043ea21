#pragma once

#include "ops/registry.h"

namespace flexcore {

/// Every kernel of every backend in this build. The only list of backends is in register.cpp.
OpRegistry make_op_registry();

void register_cpu_kernels(OpRegistry& registry);
/// Does nothing in a build without CUDA (backends/cuda/absent.cpp).
void register_cuda_kernels(OpRegistry& registry);

}  // namespace flexcore
