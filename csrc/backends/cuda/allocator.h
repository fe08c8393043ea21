#pragma once

#include <cuda_runtime.h>

#include <array>
#include <unordered_map>
#include <vector>

#include "memory/buffer.h"

namespace flexcore::cuda {

struct Stream;  // context.h

/// Memory of one GPU for the work of two streams; its copies are in the order of the first. Large blocks that are given
/// back are kept for the next of about their size: a training sequence takes and returns gigabytes, which cost
/// milliseconds to map and unmap.
class DeviceAllocator final : public Allocator {
 public:
  DeviceAllocator(int index, const Stream& first, const Stream& second) : index_(index), streams_{&first, &second} {
    kept_.reserve(64);  // it must not need memory to give memory back
  }
  ~DeviceAllocator() { trim(); }
  DeviceAllocator(const DeviceAllocator&) = delete;
  DeviceAllocator& operator=(const DeviceAllocator&) = delete;

  void* allocate(std::size_t bytes) override;
  void deallocate(void* data, std::size_t bytes) noexcept override;
  void trim() noexcept override;
  Device device() const override { return {DeviceKind::kCuda, index_}; }
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;
  void copy(void* to, const void* from, std::size_t bytes) override;

 private:
  struct Block {
    void* data;
    std::size_t bytes;
  };
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
  void wait() const noexcept;  // until neither stream works on anything
  bool records() const;
  void* reuse(std::size_t bytes);
  void shrink() noexcept;

  int index_;
  std::array<const Stream*, 2> streams_;
  std::vector<Block> kept_;                       // the oldest first
  std::unordered_map<void*, std::size_t> sizes_;  // of blocks in use that are larger than what was asked for
};

/// Page-locked host memory.
class PinnedAllocator final : public HostMemory {
 public:
  void* allocate(std::size_t bytes) override;
  void deallocate(void* data, std::size_t bytes) noexcept override;
};

}  // namespace flexcore::cuda
