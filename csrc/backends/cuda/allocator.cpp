#include "backends/cuda/allocator.h"

#include "backends/cuda/context.h"

namespace flexcore::cuda {

namespace {

// Kept are blocks from this size on, so many at most.
constexpr std::size_t kLeastKept = 1 << 20, kMostKept = 8;

// An error that was dealt with is not to be found again after the next launch.
void forget_error() { cudaGetLastError(); }

}  // namespace

void* DeviceAllocator::allocate(std::size_t bytes) {
  if (void* kept = reuse(bytes)) return kept;
  void* data = nullptr;
  cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation && !kept_.empty()) {
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

// The smallest block that is large enough and wastes little. Its last owner's work may still be going on.
void* DeviceAllocator::reuse(std::size_t bytes) noexcept {
  auto best = kept_.end();
  for (auto i = kept_.begin(); i != kept_.end(); ++i)
    if (i->bytes >= bytes && i->bytes / 5 * 4 <= bytes && (best == kept_.end() || i->bytes < best->bytes)) best = i;
  // What is recorded must not wait.
  if (best == kept_.end() || streams_[0]->keeper != nullptr) return nullptr;
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
  if (bytes >= kLeastKept) {
    kept_.push_back({data, bytes});
    if (kept_.size() <= kMostKept) return;
    data = kept_.front().data;
    kept_.erase(kept_.begin());
  }
  wait();
  cudaFree(data);
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

void DeviceAllocator::copy(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

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
