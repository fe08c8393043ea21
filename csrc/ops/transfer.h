#pragma once

#include "ops/registry.h"

namespace flexcore {

/// Copies small host tables to the device, in the order of the device's work. `host` may be changed on return.
struct StageArgs {
  static constexpr std::string_view kName = "stage";
  void* device = nullptr;
  const void* host = nullptr;
  std::size_t bytes = 0;
};
void check(const StageArgs& args);

/// Copies results back, in the order of the device's work: they are in `host` (memory of DeviceRuntime::pinned) after
/// the next synchronisation.
struct FetchArgs {
  static constexpr std::string_view kName = "fetch";
  void* host = nullptr;
  const void* device = nullptr;
  std::size_t bytes = 0;
};
void check(const FetchArgs& args);

}  // namespace flexcore
