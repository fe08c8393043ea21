#pragma once

#include <functional>
#include <memory>
#include <string>

#include "memory/buffer.h"
#include "ops/registry.h"

namespace flexcore {

/// Every kernel of every backend in this build. The only list of backends is in register.cpp.
OpRegistry make_op_registry();

void register_cpu_kernels(OpRegistry& registry);
/// Does nothing in a build without CUDA (backends/cuda/absent.cpp).
void register_cuda_kernels(OpRegistry& registry);

/// Launches of one batch shape that a device runs again without the host going through them (a CUDA graph).
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  /// Runs them on the batch that there is now. False: it does not fit what was recorded, and nothing was run.
  virtual bool replay() = 0;
  /// On the device and page-locked.
  virtual std::size_t bytes() const = 0;
};

/// A device as an engine holds it: where its bytes come from and what its ops run on.
class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;
  virtual Allocator& allocator() = 0;
  /// Host memory that the device can read and write too.
  virtual Allocator& pinned() = 0;
  /// OpContext::stream of the device's ops.
  virtual void* stream() = 0;
  /// Another, whose work runs beside that of the first; null where there is none.
  virtual void* second_stream() { return nullptr; }
  /// Makes the device the calling thread's own for as long as the result lives; all other calls are made so.
  virtual std::shared_ptr<void> enter() = 0;
  /// Whether running work again is cheaper than running it: whether `record` does anything.
  virtual bool records() const { return false; }
  /// Records what `work` runs with `context`, and runs nothing. All that ops are given by reference (spans, segments,
  /// tensors, weights) must stay where it is, with contents that may change; so must scratch. `previous`: a recording
  /// of the same work that the batch did not fit. Null: something else in the process spoiled it.
  virtual std::unique_ptr<RecordedWork> record(OpContext& /*context*/, MemoryLedger& /*ledger*/,
                                               const std::function<void()>& /*work*/,
                                               const RecordedWork* /*previous*/) {
    return nullptr;
  }
  /// Returns when everything that was given to the stream is done. Throws DeviceError for what failed on the way.
  virtual void synchronize(void* stream) = 0;
  void synchronize() { synchronize(stream()); }
  /// Returns when everything that anybody gave to the device is done: arrays that others made can be read.
  virtual void synchronize_with_others() = 0;
  /// As its maker calls it, and the bytes of its last cache before memory.
  virtual std::string name() const = 0;
  virtual std::size_t cache_bytes() const = 0;
};

/// Throws DeviceError when there is no such device, or no such backend in this build. The calling thread's own device
/// stays what it was.
std::unique_ptr<DeviceRuntime> open_device(Device device);
std::unique_ptr<DeviceRuntime> open_cuda_device(int index);  // backends/cuda
/// Bytes that a device has in all: of a GPU that is not there as in a plan for one (backends/scratch.h).
std::int64_t memory_bytes(Device device);
std::int64_t cuda_memory_bytes(int index);  // backends/cuda
/// Those that this build can use: 0 without the backend, a driver or a GPU.
int num_cuda_devices();  // backends/cuda

}  // namespace flexcore
