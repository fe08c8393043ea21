#pragma once

#include <memory>
#include <optional>
#include <span>

#include "flexcore/error.h"
#include "flexcore/tensor.h"

/// The kernels alone, on arrays that the caller owns. CPU tensors run on a pool of the calling thread's own making
/// (`Runtime`).
namespace flexcore::ops {

/// Threads and scratch memory for calls. One thread at a time may use it.
class Runtime {
 public:
  explicit Runtime(int num_threads = 0);
  ~Runtime();
  Runtime(Runtime&&) noexcept;
  Runtime& operator=(Runtime&&) noexcept;
  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace flexcore::ops
