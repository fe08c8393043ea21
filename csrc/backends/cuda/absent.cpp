#include "backends/register.h"
#include "backends/scratch.h"

namespace flexcore {

// The build has no CUDA backend: asking for the device is an error.
void register_cuda_kernels(OpRegistry&) {}

std::unique_ptr<DeviceRuntime> open_cuda_device(int) {
  throw DeviceError("device: cuda, but this build of flexcore has no CUDA backend; wanted cpu");
}

ScratchBytes cuda_scratch_bytes(int index, const ScratchShape&) {
  open_cuda_device(index);
  return {};
}

std::int64_t cuda_memory_bytes(int index) {
  open_cuda_device(index);
  return 0;
}

int num_cuda_devices() { return 0; }

}  // namespace flexcore
