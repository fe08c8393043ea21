#include "backends/cuda/recording.h"

#include <utility>

namespace flexcore::cuda {

std::mutex& capture_mutex() {
  static std::mutex mutex;
  return mutex;
}

Recording::Recording(OpContext& context, MemoryLedger& ledger, Allocator& device, Allocator& pinned,
                     const std::function<void()>& work, const Recording* previous)
    : context_(context), ledger_(ledger), device_(device), pinned_(pinned), previous_(previous) {
  require_cuda(cudaEventCreateWithFlags(&copied_, cudaEventDisableTiming), "cudaEventCreate");
  try {
    capture(work);
  } catch (...) {
    cudaEventDestroy(copied_);
    throw;
  }
  previous_ = nullptr;
}

void Recording::capture(const std::function<void()>& work) {
  Stream& stream = stream_of(context_);
  const std::lock_guard lock(capture_mutex());
  cudaGraph_t graph = nullptr;
  // Relaxed: tables are allocated while the stream is captured, which no launch in it depends on.
  require_cuda(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  stream.keeper = this;
  stream.staging.close(true);
  const auto end = [&] {
    stream.keeper = nullptr;
    stream.staging.close(false);
    return cudaStreamEndCapture(stream.handle, &graph);
  };
  try {
    work();
  } catch (...) {
    const cudaError_t ended = end();
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();
    if (ended == cudaErrorStreamCaptureInvalidated) throw CaptureLost();
    throw;
  }
  const cudaError_t ended = end();
  if (ended == cudaErrorStreamCaptureInvalidated) {
    cudaGetLastError();
    throw CaptureLost();
  }
  require_cuda(ended, "cudaStreamEndCapture");
  const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
  cudaGraphDestroy(graph);
  require_cuda(error, "cudaGraphInstantiate");
}

Recording::~Recording() {
  cudaStreamSynchronize(handle_of(context_));  // a replay may be running
  if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  if (copied_ != nullptr) cudaEventDestroy(copied_);
}

Recording::Chunk& Recording::chunk_with(std::size_t bytes) {
  constexpr std::size_t kLeast = 64 << 10;
  if (chunks_.empty() || chunks_.back().used + bytes > chunks_.back().device.bytes()) {
    const std::size_t size = std::max({kLeast, bytes, chunks_.empty() ? 0 : 2 * chunks_.back().device.bytes()});
    Chunk chunk{Buffer(device_, ledger_, MemoryTag::kWorkspace, size),
                Buffer(pinned_, ledger_, MemoryTag::kWorkspace, size)};
    chunks_.push_back(std::move(chunk));
  }
  return chunks_.back();
}

DeviceTables Recording::keep(const HostTables& tables, std::function<bool(const DeviceTables&, std::byte*)> refill) {
  constexpr std::size_t kAlignment = 64;
  const std::size_t index = kept_.size();
  const DeviceTables* least =
      previous_ != nullptr && index < previous_->kept_.size() ? &previous_->kept_[index].room : nullptr;
  DeviceTables room(tables, true, least);
  std::size_t offset = 0;
  if (room.bytes() > 0) {
    Chunk& chunk = chunk_with(room.bytes());
    offset = chunk.used;
    chunk.used += (room.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    room.put_at(chunk.device.data() + offset);
  }
  kept_.push_back({room, chunks_.empty() ? 0 : chunks_.size() - 1, offset, std::move(refill)});
  return room;
}

std::size_t Recording::bytes() const {
  std::size_t total = 0;
  for (const auto& chunk : chunks_) total += chunk.device.bytes() + chunk.image.bytes();
  return total;
}

bool Recording::replay() {
  require_cuda(cudaEventSynchronize(copied_), "a kernel or copy before");
  std::byte nothing{};
  for (const auto& kept : kept_) {
    const Arena::Scope scope(*context_.scratch);
    std::byte* image = kept.room.bytes() > 0 ? chunks_[kept.chunk].image.data() + kept.offset : &nothing;
    if (!kept.refill(kept.room, image)) return false;
  }
  const cudaStream_t stream = handle_of(context_);
  for (const auto& chunk : chunks_)
    require_cuda(cudaMemcpyAsync(chunk.device.data(), chunk.image.data(), chunk.used, cudaMemcpyHostToDevice, stream),
                 "cudaMemcpyAsync");
  require_cuda(cudaEventRecord(copied_, stream), "cudaEventRecord");
  require_cuda(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch");
  return true;
}

}  // namespace flexcore::cuda
