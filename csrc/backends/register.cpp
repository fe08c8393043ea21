#include "backends/register.h"

#include <unistd.h>

#include <fstream>

#include "backends/cpu/scratch.h"

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
  std::shared_ptr<void> enter() override { return nullptr; }
  void synchronize_with_others() override {}
  std::string name() const override {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
      if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
        return line.substr(line.find(": ") + 2);
    return "cpu";
  }
  std::size_t cache_bytes() const override {
    const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? static_cast<std::size_t>(bytes) : std::size_t{32} << 20;
  }
};

}  // namespace

std::unique_ptr<DeviceRuntime> open_device(Device device) {
  if (device.kind == DeviceKind::kCuda) return open_cuda_device(device.index);
  return std::make_unique<HostRuntime>();
}

std::int64_t memory_bytes(Device device) {
  if (device.kind == DeviceKind::kCuda) return cuda_memory_bytes(device.index);
  return static_cast<std::int64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE));
}

ScratchBytes scratch_bytes(Device device, const ScratchShape& shape) {
  if (device.kind == DeviceKind::kCuda) return cuda_scratch_bytes(device.index, shape);
  return {cpu::scratch_bytes(shape), 0};
}

}  // namespace flexcore
