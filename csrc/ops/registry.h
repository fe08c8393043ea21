#pragma once

#include <string_view>
#include <vector>

#include "core/check.h"
#include "ops/context.h"

namespace flexcore {

template <class Args>
using Kernel = void (*)(OpContext&, const Args&);

/// (argument struct, device) -> function. The argument struct is the op's identity: it has `static constexpr
/// std::string_view kName`, and a free function `void check(const Args&)` that throws InvalidArgument. Filled by
/// explicit calls, never by static objects.
class OpRegistry {
 public:
  /// Throws on a second registration.
  template <class Args>
  void add(DeviceKind device, Kernel<Args> kernel) {
    add_raw(id<Args>(), Args::kName, device, reinterpret_cast<void (*)()>(kernel));
  }
  template <class Args>
  bool supports(DeviceKind device) const {
    return find_raw(id<Args>(), device) != nullptr;
  }
  /// Throws Unsupported when the device has no such kernel.
  template <class Args>
  Kernel<Args> get(DeviceKind device) const {
    const auto kernel = find_raw(id<Args>(), device);
    require<Unsupported>(kernel != nullptr, Args::kName, ": no kernel for device ",
                         device == DeviceKind::kCpu ? "cpu" : "cuda");
    return reinterpret_cast<Kernel<Args>>(kernel);
  }

 private:
  // The address of a per-type constant names the type; nothing is registered by loading code.
  template <class Args>
  static const void* id() {
    static const char tag = 0;
    return &tag;
  }
  void add_raw(const void* op, std::string_view name, DeviceKind device, void (*kernel)());
  void (*find_raw(const void* op, DeviceKind device) const)();

  struct Entry {
    const void* op;
    DeviceKind device;
    void (*kernel)();
  };
  std::vector<Entry> entries_;
};

/// Checks the arguments and runs the op on the context's device.
template <class Args>
void run(OpContext& context, const Args& args) {
  check(args);
  context.registry->get<Args>(context.device.kind)(context, args);
}

}  // namespace flexcore
