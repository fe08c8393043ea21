#include <cuda_runtime.h>

#include <cstdlib>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

struct SimtStream {
  std::vector<std::function<void()>>* capturing = nullptr;
  bool lost = false;  // the capture: somebody waited for the device
  std::deque<std::function<void()>> pending;
  std::int64_t given = 0, done = 0;  // pieces of work
};
struct SimtEvent {
  SimtStream* stream = nullptr;
  std::int64_t position = 0;  // reached when the stream has done so many
};
struct SimtGraph {
  std::vector<std::function<void()>> work;
};
struct SimtGraphExec {
  std::vector<std::function<void()>> work;
};

namespace simt {

namespace {

std::map<char*, std::size_t> allocations;
std::size_t bytes_in_use = 0, bytes_allowed = std::numeric_limits<std::size_t>::max();
std::int64_t launches = 0;
int accesses = 0;
std::set<SimtStream*> streams;
// Two engines may run in two threads; the emulated device does one thing at a time.
std::recursive_mutex device;

// SIMT_STREAMS=late: a stream does nothing before the host or another stream waits for it, as late as a device ever
// could. What needs to wait and does not, finds memory as it was.
bool late() {
  static const bool late = [] {
    const char* wanted = std::getenv("SIMT_STREAMS");
    const std::string_view name = wanted == nullptr ? "now" : wanted;
    if (name != "now" && name != "late") throw std::runtime_error("simt: SIMT_STREAMS is now or late");
    return name == "late";
  }();
  return late;
}

void advance(SimtStream* stream, std::int64_t position) {
  while (stream->done < position && !stream->pending.empty()) {
    const auto work = std::move(stream->pending.front());
    stream->pending.pop_front();
    ++stream->done;
    work();
  }
}

// Between kernels and copies the host has no business in device memory.
void forbid([[maybe_unused]] char* data, [[maybe_unused]] std::size_t bytes, [[maybe_unused]] bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
  forbidden ? __asan_poison_memory_region(data, bytes) : __asan_unpoison_memory_region(data, bytes);
#endif
}

}  // namespace

DeviceAccess::DeviceAccess() {
  device.lock();
  if (accesses++ == 0)
    for (const auto& [data, bytes] : allocations) forbid(data, bytes, false);
}
DeviceAccess::~DeviceAccess() {
  if (--accesses == 0)
    for (const auto& [data, bytes] : allocations) forbid(data, bytes, true);
  device.unlock();
}

void advance_all() {
  for (auto* stream : streams) advance(stream, stream->given);
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->capturing != nullptr) {
    stream->capturing->push_back(std::move(work));
    return;
  }
  const std::lock_guard lock(device);
  if (stream == nullptr || !late()) {
    work();
    return;
  }
  stream->pending.push_back(std::move(work));
  ++stream->given;
}

std::size_t device_bytes() { return bytes_in_use; }
void limit_device_bytes(std::size_t bytes) { bytes_allowed = bytes; }
std::int64_t num_launches() { return launches; }
void count_launch() { ++launches; }

}  // namespace simt

namespace flexcore::test {
bool emulated() { return true; }  // tests/cpp/test_device.h
}  // namespace flexcore::test

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  *properties = {};
  std::strcpy(properties->name, "host threads");
  properties->major = 8;
  properties->multiProcessorCount = 4;
  properties->l2CacheSize = 1 << 20;
  properties->totalGlobalMem = std::size_t{8} << 30;
  properties->sharedMemPerBlockOptin = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = std::size_t{8} << 30;
  *free = *total - simt::bytes_in_use;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  const std::lock_guard lock(simt::device);
  *data = nullptr;
  if (bytes > simt::bytes_allowed || simt::bytes_in_use > simt::bytes_allowed - bytes) return cudaErrorMemoryAllocation;
  // aligned_alloc wants a whole number of alignments; a sanitizer should know the exact end.
  if (posix_memalign(data, 256, bytes == 0 ? 1 : bytes) != 0) return cudaErrorMemoryAllocation;
  std::memset(*data, 0xff, bytes);  // NaN
  simt::allocations[static_cast<char*>(*data)] = bytes;
  simt::bytes_in_use += bytes;
  if (simt::accesses == 0) simt::forbid(static_cast<char*>(*data), bytes, true);
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  const std::lock_guard lock(simt::device);
  if (data == nullptr) return cudaSuccess;
  const auto found = simt::allocations.find(static_cast<char*>(data));
  if (found == simt::allocations.end()) return cudaErrorInvalidValue;
  simt::advance_all();  // as the runtime does
  simt::forbid(found->first, found->second, false);
  simt::bytes_in_use -= found->second;
  simt::allocations.erase(found);
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  simt::enqueue(stream, [=] {
    const simt::DeviceAccess access;
    std::memmove(to, from, bytes);
  });
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream) {
  simt::enqueue(stream, [=] {
    const simt::DeviceAccess access;
    std::memset(data, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const std::lock_guard lock(simt::device);
  *stream = *simt::streams.insert(new SimtStream).first;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(simt::device);
  simt::advance(stream, stream->given);
  simt::streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard lock(simt::device);
  if (stream == nullptr) return cudaDeviceSynchronize();
  if (stream->capturing != nullptr) {
    stream->lost = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  simt::advance(stream, stream->given);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const std::lock_guard lock(simt::device);
  bool captures = false;
  for (auto* stream : simt::streams)
    if (stream->capturing != nullptr) stream->lost = captures = true;
  if (captures) return cudaErrorStreamCaptureUnsupported;
  simt::advance_all();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (event->stream != nullptr)
    simt::enqueue(stream, [before = event->stream, position = event->position] { simt::advance(before, position); });
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new SimtEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  *event = {stream, stream->given};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::lock_guard lock(simt::device);
  if (event->stream != nullptr) simt::advance(event->stream, event->position);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->capturing != nullptr) return cudaErrorInvalidValue;
  stream->capturing = new std::vector<std::function<void()>>;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream == nullptr || stream->capturing == nullptr) return cudaErrorInvalidValue;
  *graph = nullptr;
  const bool lost = std::exchange(stream->lost, false);
  if (!lost) *graph = new SimtGraph{std::move(*stream->capturing)};
  delete std::exchange(stream->capturing, nullptr);
  return lost ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new SimtGraphExec{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  for (const auto& work : exec->work) simt::enqueue(stream, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
