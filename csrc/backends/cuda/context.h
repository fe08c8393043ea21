#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <span>

#include "backends/cuda/allocator.h"
#include "core/check.h"
#include "memory/arena.h"
#include "ops/context.h"

namespace flexcore::cuda {

/// Throws DeviceError that names what was tried.
inline void require_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) [[unlikely]]
    throw DeviceError(str("cuda: ", what, ": ", cudaGetErrorString(error)));
}

/// Page-locked host memory that small tables pass through on their way to the device and back. Reused in a circle;
/// before a part is written again, the stream has done with it.
class Staging {
 public:
  explicit Staging(cudaStream_t stream) : stream_(stream) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// Copies host bytes to the device, in the order of the stream. `host` may be changed when it returns.
  void upload(void* device, const void* host, std::size_t bytes);
  /// Copies device bytes to the host and waits for them, and so for all work before.
  void download(void* host, const void* device, std::size_t bytes);

 private:
  std::byte* room(std::size_t bytes);  // of so many bytes that the stream has done with

  PinnedAllocator pinned_;
  cudaStream_t stream_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0, used_ = 0;
};

/// What OpContext::stream points to on a CUDA device.
struct Stream {
  explicit Stream(int device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t handle = nullptr;
  Staging staging;
  int num_multiprocessors = 1;
  std::size_t l2_bytes = 0;    // second-level cache
  std::shared_ptr<void> gemm;  // the GEMM library's state, made at the first product
};

inline Stream& stream_of(const OpContext& context) { return *static_cast<Stream*>(context.stream); }
inline cudaStream_t handle_of(const OpContext& context) { return stream_of(context).handle; }

/// A copy of a host table in scratch.
template <class T>
const T* on_device(OpContext& context, std::span<const T> table) {
  if (table.empty()) return nullptr;
  T* device = context.scratch->allocate<T>(table.size());
  stream_of(context).staging.upload(device, table.data(), table.size_bytes());
  return device;
}

/// After a launch: a configuration that the device refused.
inline void check_launch(std::string_view op) { require_cuda(cudaGetLastError(), std::string(op).c_str()); }

}  // namespace flexcore::cuda
