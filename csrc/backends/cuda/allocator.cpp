#include "backends/cuda/allocator.h"

#include "backends/cuda/context.h"

namespace flexcore::cuda {

namespace {

// An error that was dealt with is not to be found again after the next launch.
void forget_error() { cudaGetLastError(); }

}  // namespace

void* DeviceAllocator::allocate(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    forget_error();
    return nullptr;
  }
  require_cuda(error, "cudaMalloc");
  return data;
}

void DeviceAllocator::deallocate(void* data, std::size_t) noexcept {
  cudaDeviceSynchronize();  // nobody may still be reading it, on any stream
  cudaFree(data);
}

void DeviceAllocator::upload(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyHostToDevice);
  synchronize();
}

void DeviceAllocator::download(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyDeviceToHost);
  synchronize();
}

void DeviceAllocator::copy(void* to, const void* from, std::size_t bytes) {
  copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

void DeviceAllocator::copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  if (bytes > 0) require_cuda(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
}

void DeviceAllocator::synchronize() { require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before"); }

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
