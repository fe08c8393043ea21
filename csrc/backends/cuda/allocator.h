#pragma once

#include <cuda_runtime.h>

#include "memory/buffer.h"

namespace flexcore::cuda {

/// Memory of one GPU. Its copies are in the order of a stream.
class DeviceAllocator final : public Allocator {
 public:
  DeviceAllocator(int index, cudaStream_t stream) : index_(index), stream_(stream) {}
  void* allocate(std::size_t bytes) override;
  void deallocate(void* data, std::size_t bytes) noexcept override;
  Device device() const override { return {DeviceKind::kCuda, index_}; }
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;

 private:
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
  void synchronize();

  int index_;
  cudaStream_t stream_;
};

/// Page-locked host memory.
class PinnedAllocator final : public HostMemory {
 public:
  void* allocate(std::size_t bytes) override;
  void deallocate(void* data, std::size_t bytes) noexcept override;
};

}  // namespace flexcore::cuda
