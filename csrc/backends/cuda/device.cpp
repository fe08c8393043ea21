#include <algorithm>
#include <cstring>
#include <utility>

#include "backends/cuda/context.h"
#include "backends/register.h"

namespace flexcore {

namespace cuda {

namespace {

class DeviceAllocator final : public Allocator {
 public:
  DeviceAllocator(int index, cudaStream_t stream) : index_(index), stream_(stream) {}
  void* allocate(std::size_t bytes) override {
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // it is remembered otherwise
      return nullptr;
    }
    require_cuda(error, "cudaMalloc");
    return data;
  }
  void deallocate(void* data, std::size_t) noexcept override {
    cudaStreamSynchronize(stream_);  // nobody may still be reading it
    cudaFree(data);
  }
  Device device() const override { return {DeviceKind::kCuda, index_}; }
  void upload(void* to, const void* from, std::size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
    synchronize();
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
    synchronize();
  }
  void copy(void* to, const void* from, std::size_t bytes) override { copy(to, from, bytes, cudaMemcpyDeviceToDevice); }

 private:
  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    require_cuda(cudaMemcpyAsync(to, from, bytes, kind, stream_), "cudaMemcpyAsync");
  }
  void synchronize() { require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before"); }
  int index_;
  cudaStream_t stream_;
};

class PinnedAllocator final : public HostMemory {
 public:
  void* allocate(std::size_t bytes) override {
    void* data = nullptr;
    if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) == cudaSuccess) return data;
    cudaGetLastError();
    return nullptr;
  }
  void deallocate(void* data, std::size_t) noexcept override { cudaFreeHost(data); }
};

class Runtime final : public DeviceRuntime {
 public:
  explicit Runtime(int index) : stream_(index), allocator_(index, stream_.handle) {}
  Allocator& allocator() override { return allocator_; }
  Allocator& pinned() override { return pinned_; }
  void* stream() override { return &stream_; }
  void synchronize() override { require_cuda(cudaStreamSynchronize(stream_.handle), "a kernel or copy before"); }

 private:
  Stream stream_;
  DeviceAllocator allocator_;
  PinnedAllocator pinned_;
};

// Raises the error before anything else is made on a machine without a driver or a device.
cudaStream_t open_stream(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  require<DeviceError>(error == cudaSuccess, "device: cuda: ", cudaGetErrorString(error));
  require<DeviceError>(0 <= device && device < count, "device: cuda:", device, ", but this machine has ", count,
                       " CUDA devices");
  require_cuda(cudaSetDevice(device), "cudaSetDevice");
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

}  // namespace

Stream::Stream(int device) : handle(open_stream(device)), staging(handle) {
  cudaDeviceProp properties;
  require_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  num_multiprocessors = properties.multiProcessorCount;
  l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
}

Stream::~Stream() { cudaStreamDestroy(handle); }

Staging::~Staging() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

std::byte* Staging::room(std::size_t bytes) {
  constexpr std::size_t kLeast = 1 << 20, kAlignment = 64;
  if (used_ + bytes > bytes_) {
    require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before");
    used_ = 0;
    if (bytes > bytes_) {
      if (data_ != nullptr) cudaFreeHost(std::exchange(data_, nullptr));
      bytes_ = 0;
      const std::size_t wanted = std::max(kLeast, 2 * bytes);
      void* data = nullptr;
      require<OutOfMemory>(cudaHostAlloc(&data, wanted, cudaHostAllocDefault) == cudaSuccess, "out of memory: ", wanted,
                           " bytes of page-locked host memory");
      data_ = static_cast<std::byte*>(data);
      bytes_ = wanted;
    }
  }
  std::byte* part = data_ + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return part;
}

void Staging::upload(void* device, const void* host, std::size_t bytes) {
  std::byte* part = room(bytes);
  std::memcpy(part, host, bytes);
  require_cuda(cudaMemcpyAsync(device, part, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
}

void Staging::download(void* host, const void* device, std::size_t bytes) {
  std::byte* part = room(bytes);
  require_cuda(cudaMemcpyAsync(part, device, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
  require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before");
  std::memcpy(host, part, bytes);
}

}  // namespace cuda

std::unique_ptr<DeviceRuntime> open_cuda_device(int index) { return std::make_unique<cuda::Runtime>(index); }

}  // namespace flexcore
