#include "ops/registry.h"

#include <algorithm>

namespace flexcore {

void OpRegistry::add_raw(const void* op, std::string_view name, DeviceKind device, void (*kernel)()) {
  require(kernel != nullptr, name, ": null kernel");
  require(find_raw(op, device) == nullptr, name, ": registered twice for one device");
  entries_.push_back({op, device, kernel});
}

void (*OpRegistry::find_raw(const void* op, DeviceKind device) const)() {
  const auto entry =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.op == op && e.device == device; });
  return entry == entries_.end() ? nullptr : entry->kernel;
}

}  // namespace flexcore
