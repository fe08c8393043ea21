#pragma once

#include <memory>

#include "memory/buffer.h"
#include "ops/registry.h"

namespace flexcore {

/// Every kernel of every backend in this build. The only list of backends is in register.cpp.
OpRegistry make_op_registry();

void register_cpu_kernels(OpRegistry& registry);
/// Does nothing in a build without CUDA (backends/cuda/absent.cpp).
void register_cuda_kernels(OpRegistry& registry);

/// A device as an engine holds it: where its bytes come from and what its ops run on.
class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;
  virtual Allocator& allocator() = 0;
  /// Host memory that the device can read and write too.
  virtual Allocator& pinned() = 0;
  /// OpContext::stream of the device's ops.
  virtual void* stream() = 0;
  /// Returns when everything that was given to the stream is done. Throws DeviceError for what failed on the way.
  virtual void synchronize() = 0;
};

/// Throws DeviceError when there is no such device, or no such backend in this build.
std::unique_ptr<DeviceRuntime> open_device(Device device);
std::unique_ptr<DeviceRuntime> open_cuda_device(int index);  // backends/cuda
/// Those that this build can use: 0 without the backend, a driver or a GPU.
int num_cuda_devices();  // backends/cuda

}  // namespace flexcore
