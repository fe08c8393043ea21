#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "flexcore/tensor.h"
#include "memory/ledger.h"

namespace flexcore {

/// Where bytes come from on one device. Backends implement it; the CPU one is `host_allocator`.
class Allocator {
 public:
  virtual ~Allocator() = default;
  /// Aligned to at least 64 bytes, not initialised. Null when there is no memory left.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void deallocate(void* data, std::size_t bytes) noexcept = 0;
  /// Gives back what it keeps for the next allocations of the same size, if it does.
  virtual void trim() noexcept {}
  virtual Device device() const = 0;
  /// From host memory to this device's, back, and within it, where memory that the device reads itself belongs to it
  /// too. They see the work given to the device before; when upload and download return, the bytes are there.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
};

Allocator& host_allocator();

/// An allocator of host memory: copies are memcpy.
class HostMemory : public Allocator {
 public:
  Device device() const override { return {}; }
  void upload(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }
  void download(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override;
};

/// Owns bytes on a device, counted in a ledger under a tag. Move-only.
class Buffer {
 public:
  Buffer() = default;
  /// Throws OutOfMemory with the ledger in its text.
  Buffer(Allocator& allocator, MemoryLedger& ledger, MemoryTag tag, std::size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  std::size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }
  Allocator& allocator() const { return *allocator_; }
  void reset() noexcept;

  /// A contiguous tensor that begins `offset` bytes into the buffer.
  TensorView view(DType dtype, std::initializer_list<std::int64_t> shape, std::size_t offset = 0) const;

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  Allocator* allocator_ = nullptr;
  MemoryLedger* ledger_ = nullptr;
  MemoryTag tag_ = MemoryTag::kWorkspace;
};

}  // namespace flexcore
