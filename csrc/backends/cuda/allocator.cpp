#include "backends/cuda/allocator.h"

#include <algorithm>

#include "backends/cuda/context.h"

namespace flexcore::cuda {

namespace {

// Kept are blocks from this size on, so many at most, and together no more than a few of the largest: what is kept is
// nobody's, and others on the device may want it.
constexpr std::size_t kLeastKept = 1 << 20, kMostKept = 8, kLargestKept = 2;

// An error that was dealt with is not to be found again after the next launch.
void forget_error() { cudaGetLastError(); }

}  // namespace

void* DeviceAllocator::allocate(std::size_t bytes) {
  if (void* kept = reuse(bytes)) return kept;
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation && !kept_.empty() && !records()) {
    forget_error();
    trim();
    error = cudaMalloc(&data, bytes);
  }
  if (error == cudaErrorMemoryAllocation) {
    forget_error();
    return nullptr;
  }
  require_cuda(error, "cudaMalloc");
  return data;
}

// While work is recorded, nothing may wait for the stream.
bool DeviceAllocator::records() const { return streams_[0]->keeper != nullptr; }

// The smallest block that is large enough and wastes little. Its last owner's work may still be going on.
void* DeviceAllocator::reuse(std::size_t bytes) {
  auto best = kept_.end();
  for (auto i = kept_.begin(); i != kept_.end(); ++i)
    if (i->bytes >= bytes && i->bytes / 5 * 4 <= bytes && (best == kept_.end() || i->bytes < best->bytes)) best = i;
  if (best == kept_.end() || records()) return nullptr;
  wait();
  void* data = best->data;
  sizes_[data] = best->bytes;
  kept_.erase(best);
  return data;
}

void DeviceAllocator::deallocate(void* data, std::size_t bytes) noexcept {
  // A block that was used again is as large as it was at first.
  if (const auto whole = sizes_.find(data); whole != sizes_.end()) {
    bytes = whole->second;
    sizes_.erase(whole);
  }
  if ((bytes < kLeastKept && !records()) || kept_.size() == kept_.capacity()) {
    wait();
    cudaFree(data);
    return;
  }
  kept_.push_back({data, bytes});
  if (!records()) shrink();
}

void DeviceAllocator::shrink() noexcept {
  const auto too_much = [&] {
    std::size_t all = 0, largest = 0;
    for (const auto& block : kept_) all += block.bytes, largest = std::max(largest, block.bytes);
    return kept_.size() > kMostKept || all > kLargestKept * largest;
  };
  while (too_much()) {
    wait();
    cudaFree(kept_.front().data);
    kept_.erase(kept_.begin());
  }
}

void DeviceAllocator::trim() noexcept {
  if (!kept_.empty()) wait();
  for (const auto& block : kept_) cudaFree(block.data);
  kept_.clear();
}

void DeviceAllocator::wait() const noexcept {
  for (const auto* stream : streams_) cudaStreamSynchronize(stream->handle);
}

void DeviceAllocator::upload(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyHostToDevice);
  require_cuda(cudaStreamSynchronize(streams_[0]->handle), "a kernel or copy before");
}

void DeviceAllocator::download(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyDeviceToHost);
  require_cuda(cudaStreamSynchronize(streams_[0]->handle), "a kernel or copy before");
}

void DeviceAllocator::copy(void* to, const void* from, std::size_t bytes) { copy(to, from, bytes, cudaMemcpyDefault); }

void DeviceAllocator::copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  if (bytes > 0) require_cuda(cudaMemcpyAsync(to, from, bytes, kind, streams_[0]->handle), "cudaMemcpyAsync");
}

void* PinnedAllocator::allocate(std::size_t bytes) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) == cudaSuccess) return data;
  forget_error();
  return nullptr;
}

void PinnedAllocator::deallocate(void* data, std::size_t) noexcept {
  if (data != nullptr) cudaFreeHost(data);
}

}  // namespace flexcore::cuda
