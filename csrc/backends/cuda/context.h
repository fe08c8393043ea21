#pragma once

#include <cuda_runtime.h>

#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

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

/// Page-locked host memory that small tables pass through on their way to the device and back, used half by half: a
/// half is written again when the stream has done with it, which a step rarely has to wait for.
class Staging {
 public:
  explicit Staging(cudaStream_t stream) : stream_(stream) {}
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// What `write(std::byte*)` puts into so many bytes, to the device in the order of the stream.
  template <class Write>
  void upload(void* device, std::size_t bytes, Write&& write) {
    std::byte* part = room(bytes);
    write(part);
    send(device, part, bytes);
  }
  /// Copies host bytes to the device. `host` may be changed when it returns.
  void upload(void* device, const void* host, std::size_t bytes);
  /// Copies device bytes to the host and waits for them, and so for all work before.
  void download(void* host, const void* device, std::size_t bytes);

  /// While a recording is made, what passes through here would be the same at every replay: an error.
  void close(bool closed) { closed_ = closed; }

 private:
  struct Half {
    std::byte* data = nullptr;
    cudaEvent_t done = nullptr;  // recorded when the other half was begun
  };
  std::byte* room(std::size_t bytes);  // of so many bytes that the stream has done with
  void send(void* device, const std::byte* part, std::size_t bytes);
  void grow(std::size_t bytes);

  PinnedAllocator pinned_;
  cudaStream_t stream_;
  std::array<Half, 2> halves_;
  std::size_t current_ = 0, half_bytes_ = 0, used_ = 0;
  bool closed_ = false;
};

class TableKeeper;  // tables.h

/// Tables that all layers share, while OpContext::batch stays the same (tables.h).
struct BatchTables {
  using Key = std::vector<std::int64_t>;
  std::uint64_t batch = 0;
  std::map<Key, std::shared_ptr<void>> tables;
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
  BatchTables batch_tables;
  TableKeeper* keeper = nullptr;  // of the recording that is being made
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
