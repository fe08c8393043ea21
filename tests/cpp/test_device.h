#pragma once

#include <cstdlib>
#include <string_view>

#include "backends/register.h"

namespace flexcore::test {

/// The device that this run of the tests is about: FLEXCORE_TEST_DEVICE, or the CPU.
inline Device test_device() {
  const char* name = std::getenv("FLEXCORE_TEST_DEVICE");
  return {name != nullptr && std::string_view(name) == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu, 0};
}
inline bool on_cpu() { return test_device().kind == DeviceKind::kCpu; }
/// Whether the device is tests/simt, which says so: slower by a thousand, so sizes that prove nothing more are left
/// out.
[[gnu::weak]] bool emulated() { return false; }
inline DeviceRuntime& test_runtime() {
  static const auto runtime = open_device(test_device());
  return *runtime;
}

}  // namespace flexcore::test
