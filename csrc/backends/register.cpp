#include "backends/register.h"

namespace flexcore {

OpRegistry make_op_registry() {
  OpRegistry registry;
  register_cpu_kernels(registry);
  register_cuda_kernels(registry);
  return registry;
}

namespace {

class HostRuntime final : public DeviceRuntime {
 public:
  Allocator& allocator() override { return host_allocator(); }
  Allocator& pinned() override { return host_allocator(); }
  void* stream() override { return nullptr; }
  void synchronize(void*) override {}
};

}  // namespace

std::unique_ptr<DeviceRuntime> open_device(Device device) {
  if (device.kind == DeviceKind::kCuda) return open_cuda_device(device.index);
  return std::make_unique<HostRuntime>();
}

}  // namespace flexcore
