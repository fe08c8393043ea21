#include <algorithm>
#include <cstring>
#include <utility>

#include "backends/cuda/allocator.h"
#include "backends/cuda/context.h"
#include "backends/register.h"

namespace flexcore {

namespace cuda {

namespace {

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
  if (error != cudaSuccess) {
    int driver = 0;  // stays 0 without one; the runtime's own text would speak of versions
    cudaDriverGetVersion(&driver);
    throw DeviceError(str("device: cuda, but ", driver > 0 ? cudaGetErrorString(error) : "no NVIDIA driver was found",
                          "; wanted cpu"));
  }
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

Staging::~Staging() { pinned_.deallocate(data_, bytes_); }

std::byte* Staging::room(std::size_t bytes) {
  constexpr std::size_t kLeast = 1 << 20, kAlignment = 64;
  if (used_ + bytes > bytes_) {
    require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before");
    used_ = 0;
    if (bytes > bytes_) {
      pinned_.deallocate(std::exchange(data_, nullptr), std::exchange(bytes_, 0));
      const std::size_t wanted = std::max(kLeast, 2 * bytes);
      data_ = static_cast<std::byte*>(pinned_.allocate(wanted));
      require<OutOfMemory>(data_ != nullptr, "out of memory: ", wanted, " bytes of page-locked host memory");
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

int num_cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::unique_ptr<DeviceRuntime> open_cuda_device(int index) { return std::make_unique<cuda::Runtime>(index); }

}  // namespace flexcore
