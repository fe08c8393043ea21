#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "backends/cuda/tables.h"
#include "backends/register.h"

namespace flexcore::cuda {

/// Held while work is recorded, and while a whole device is waited for: that spoils what others are recording.
std::mutex& capture_mutex();

/// A recording that somebody else's call spoiled.
struct CaptureLost {};

/// A CUDA graph of the launches of one batch shape, and the tables that its kernels read. A replay makes the tables
/// again, copies them at once and launches the graph: the host goes through no layer.
class Recording final : public RecordedWork, public TableKeeper {
 public:
  /// `previous`: a recording of the same work whose room was not enough. Throws CaptureLost.
  Recording(OpContext& context, MemoryLedger& ledger, Allocator& device, Allocator& pinned,
            const std::function<void()>& work, const Recording* previous);
  ~Recording() override;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  bool replay() override;
  std::size_t bytes() const override;
  DeviceTables keep(const HostTables& tables, std::function<bool(const DeviceTables&, std::byte*)> refill) override;

 private:
  /// Tables on the device and the image of them that a replay copies.
  struct Chunk {
    Buffer device, image;
    std::size_t used = 0;
  };
  struct Kept {
    DeviceTables room;
    std::size_t chunk, offset;
    std::function<bool(const DeviceTables&, std::byte*)> refill;
  };
  Chunk& chunk_with(std::size_t bytes);
  void capture(const std::function<void()>& work);

  OpContext& context_;
  MemoryLedger& ledger_;
  Allocator &device_, &pinned_;
  const Recording* previous_;
  std::vector<Chunk> chunks_;
  std::vector<Kept> kept_;
  cudaEvent_t copied_ = nullptr;  // the images of the last replay
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace flexcore::cuda
