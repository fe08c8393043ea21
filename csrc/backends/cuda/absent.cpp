#include "backends/register.h"

namespace flexcore {

// The build has no CUDA backend: asking for the device gives Unsupported from the registry.
void register_cuda_kernels(OpRegistry&) {}

}  // namespace flexcore
