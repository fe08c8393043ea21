#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>

#include "backends/cuda/allocator.h"
#include "backends/cuda/recording.h"
#include "backends/register.h"

namespace flexcore {

namespace cuda {

namespace {

/// The thread's device, until it is the one before again.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    require_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    require_cuda(cudaSetDevice(index), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

class Runtime final : public DeviceRuntime {
 public:
  explicit Runtime(int index)
      : index_(index), stream_(index), second_stream_(index), allocator_(index, stream_, second_stream_) {}
  Allocator& allocator() override { return allocator_; }
  Allocator& pinned() override { return pinned_; }
  void* stream() override { return &stream_; }
  void* second_stream() override { return &second_stream_; }
  std::shared_ptr<void> enter() override { return std::make_shared<CurrentDevice>(index_); }
  bool records() const override { return true; }
  std::unique_ptr<RecordedWork> record(OpContext& context, MemoryLedger& ledger, const std::function<void()>& work,
                                       const RecordedWork* previous) override {
    try {
      return std::make_unique<Recording>(context, ledger, allocator_, pinned_, work,
                                         static_cast<const Recording*>(previous));
    } catch (const CaptureLost&) {
      return nullptr;
    }
  }
  void synchronize(void* stream) override {
    require_cuda(cudaStreamSynchronize(static_cast<Stream*>(stream)->handle), "a kernel or copy before");
  }
  void synchronize_with_others() override {
    const std::lock_guard lock(capture_mutex());
    require_cuda(cudaDeviceSynchronize(), "a kernel or copy before");
  }
  std::string name() const override {
    cudaDeviceProp properties;
    require_cuda(cudaGetDeviceProperties(&properties, index_), "cudaGetDeviceProperties");
    return properties.name;
  }
  std::size_t cache_bytes() const override { return stream_.l2_bytes; }

 private:
  int index_;
  Stream stream_, second_stream_;
  DeviceAllocator allocator_;
  PinnedAllocator pinned_;
};

void require_device(int device) {
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
}

cudaStream_t make_stream() {
  cudaStream_t stream = nullptr;
  require_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return stream;
}

}  // namespace

Stream::Stream(int device) : handle(make_stream()), staging(handle) {
  cudaDeviceProp properties;
  require_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  num_multiprocessors = properties.multiProcessorCount;
  l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
}

Stream::~Stream() { cudaStreamDestroy(handle); }

Staging::~Staging() {
  for (auto& half : halves_) {
    pinned_.deallocate(half.data, half_bytes_);
    if (half.done != nullptr) cudaEventDestroy(half.done);
  }
}

void Staging::grow(std::size_t bytes) {
  constexpr std::size_t kLeast = 1 << 20;
  const std::size_t wanted = std::max(kLeast, 2 * bytes);
  require_cuda(cudaStreamSynchronize(stream_), "a kernel or copy before");
  for (auto& half : halves_) pinned_.deallocate(std::exchange(half.data, nullptr), half_bytes_);
  half_bytes_ = used_ = 0;
  for (auto& half : halves_) {
    half.data = static_cast<std::byte*>(pinned_.allocate(wanted));
    require<OutOfMemory>(half.data != nullptr, "out of memory: ", wanted, " bytes of page-locked host memory");
    if (half.done == nullptr)
      require_cuda(cudaEventCreateWithFlags(&half.done, cudaEventDisableTiming), "cudaEventCreate");
  }
  half_bytes_ = wanted;
}

std::byte* Staging::room(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  require<Error>(!closed_, "cuda: a host table of its own in a step that is being recorded");
  if (bytes > half_bytes_) grow(bytes);
  if (used_ + bytes > half_bytes_) {
    require_cuda(cudaEventRecord(halves_[current_].done, stream_), "cudaEventRecord");
    current_ = 1 - current_;
    require_cuda(cudaEventSynchronize(halves_[current_].done), "a kernel or copy before");
    used_ = 0;
  }
  std::byte* part = halves_[current_].data + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return part;
}

void Staging::send(void* device, const std::byte* part, std::size_t bytes) {
  require_cuda(cudaMemcpyAsync(device, part, bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
}

void Staging::upload(void* device, const void* host, std::size_t bytes) {
  upload(device, bytes, [&](std::byte* part) { std::memcpy(part, host, bytes); });
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

std::unique_ptr<DeviceRuntime> open_cuda_device(int index) {
  cuda::require_device(index);
  const cuda::CurrentDevice current(index);
  return std::make_unique<cuda::Runtime>(index);
}

}  // namespace flexcore
