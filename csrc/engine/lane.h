#pragma once

#include <array>
#include <optional>
#include <vector>

#include "backends/register.h"
#include "graph/operator.h"
#include "memory/arena.h"
#include "ops/transfer.h"
#include "peft/adapter_store.h"

namespace flexcore {

/// Rows and pages that programs are run with at most.
struct ExecutorLimits {
  std::int64_t max_rows = 0;  // of a forward or a backward unit
  std::int64_t max_sampled_rows = 0;
  std::int64_t max_positions = 0;
  std::int64_t num_blocks = 0, block_size = 0;
  std::int64_t num_host_blocks = 0;
};

/// Names the batch for as long as its spans stay.
class BatchIdentity {
 public:
  BatchIdentity(OpContext& context, std::uint64_t batch) : context_(context) { context_.batch = batch; }
  ~BatchIdentity() { context_.batch = 0; }
  BatchIdentity(const BatchIdentity&) = delete;
  BatchIdentity& operator=(const BatchIdentity&) = delete;

 private:
  OpContext& context_;
};

/// What programs on one stream run with: index tables, workspace, scratch, and the batch as operators see it.
class Lane {
 public:
  enum class IndexArray : std::size_t { kTokens, kPositions, kRows, kLabels, kScale, kOffsets, kLoss };

  /// On the engine's context.
  Lane(OpContext& context, Allocator& allocator, MemoryLedger& ledger, const ExecutorLimits& limits, const Graph& base);
  /// On a stream of its own, with scratch of its own.
  Lane(const OpContext& like, void* stream, Allocator& allocator, MemoryLedger& ledger, const ExecutorLimits& limits,
       const Graph& base, std::size_t scratch_bytes);
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  OpContext& context() { return *context_; }
  std::byte* workspace() const { return workspace_.data(); }
  /// Grows the workspace; what ran with it before is done. Throws OutOfMemory and keeps what there was.
  void reserve_workspace(std::size_t bytes);
  std::size_t workspace_bytes() const { return workspace_.bytes(); }
  static std::size_t indices_bytes(const ExecutorLimits& limits);
  /// Parts of a workspace begin at multiples of this.
  static constexpr std::size_t kAlignment = 64;
  static std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  TensorView index_array(IndexArray which, DType dtype, std::int64_t size) const;
  /// The array on the device, with what is in the host's table.
  template <class T>
  TensorView staged(IndexArray which, DType dtype, const std::vector<T>& table) {
    static_assert(sizeof(T) == 4);
    const TensorView array = index_array(which, dtype, static_cast<std::int64_t>(table.size()));
    run(*context_, StageArgs{array.data(), table.data(), array.bytes()});
    return array;
  }

  void clear_segments();
  /// Rows [begin, end) are tokens of a sequence from `position` on; `adapter` null: none of them is virtual.
  void add_virtual_rows(const Adapter* adapter, std::int64_t position, std::int64_t begin, std::int64_t end,
                        float* gradients);
  /// `dropout`: of the rows' sequence; null: none.
  void add_segments(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients,
                    const SegmentDropout* dropout);
  /// What the output layer's programs have instead: rows of a head, sampled or with a target, in their order.
  void begin_output_rows();
  void add_output_rows(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients,
                       const SegmentDropout* dropout);
  /// Segments for a batch that is recorded: every site has `count`, at addresses that stay. Adapters come by position
  /// in the batch, and are plain LoRA; what a site lacks has no rows.
  static constexpr std::size_t kMostFixedSegments = 64;
  void begin_fixed_segments(std::size_t count, std::int64_t num_rows);
  void set_fixed_segments(std::size_t index, const Adapter& adapter, std::int64_t begin, std::int64_t end);

  BatchState batch;

 private:
  static constexpr std::size_t kNumIndexArrays = 7;

  OpContext own_context_;
  std::optional<Arena> own_scratch_;
  OpContext* context_;
  Allocator& allocator_;
  MemoryLedger& ledger_;
  Buffer indices_, workspace_;
  std::vector<SiteSegments> segments_;         // by site
  std::vector<SiteSegments> fixed_segments_;   // by site; `lora` is never moved
  std::vector<SiteSegments> output_segments_;  // by site; all but the output layer's are empty
  SiteId output_site_;
  const Adapter* last_output_ = nullptr;  // whose rows may be extended
  std::vector<SiteId> sites_in_use_;
  std::vector<VirtualRows> virtual_rows_;
};

}  // namespace flexcore
