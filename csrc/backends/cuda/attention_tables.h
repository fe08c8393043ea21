#pragma once

#include <array>
#include <climits>
#include <span>
#include <vector>

#include "backends/cuda/context.h"
#include "backends/cuda/kernels/attention_problem.cuh"
#include "ops/attention.h"

namespace flexcore::cuda {

/// How a kernel wants rows and keys cut.
struct AttentionCut {
  std::array<int, 4> tile_rows{};  // sizes of row tiles that it knows, ascending; 0: none further
  int key_tile = 0;                // splits of the keys begin at multiples of it
  int owned_keys = 0;              // backward: keys whose gradients a block owns; 0: none wanted
  std::int64_t slots = 1;          // blocks that run at once
};

/// What a batch of spans means for a head shape and a cut: everything that kernels read but tensors and accumulators.
/// Arrays are on the device. Nothing in it depends on a layer: made once for all calls of a batch (tables.h).
struct AttentionTables {
  const std::int32_t* block_tables = nullptr;
  const AttentionItem* items = nullptr;  // dearest first, then any without rows
  const AttentionMerge* merges = nullptr;
  const AttentionKeyItem* key_items = nullptr;
  std::int64_t num_items = 0, num_merges = 0, num_key_items = 0;
  std::int64_t partial_rows = 0;  // rows of the items whose keys are split
};

struct AttentionHeads {
  std::int64_t group, num_kv_heads, block_size;
  std::int64_t window;  // 0: none
};

/// Cuts rows into tiles and, where these are too few for the device, their keys into splits. `spans` outlive the batch.
AttentionTables attention_tables(OpContext& context, std::span<const AttentionSpan> spans, const AttentionHeads& heads,
                                 const AttentionCut& cut);
/// The same for spans that only this call knows.
AttentionTables attention_tables_of_call(OpContext& context, std::vector<AttentionSpan> spans,
                                         const AttentionHeads& heads, const AttentionCut& cut);

/// Where every row of the spans is stored; places of no token have row -1.
struct KvSlots {
  const KvSlot* slots;
  std::int64_t count;
};
KvSlots kv_slots(OpContext& context, std::span<const AttentionSpan> spans, std::int64_t page_rows,
                 std::int64_t block_size);

}  // namespace flexcore::cuda
