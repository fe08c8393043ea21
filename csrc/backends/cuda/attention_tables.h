#pragma once

#include <array>
#include <climits>
#include <span>

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
/// Arrays are in scratch, on the device. Nothing in it depends on a layer, so that a step could build it once.
struct AttentionTables {
  const std::int32_t* block_tables = nullptr;
  const AttentionItem* items = nullptr;  // dearest first
  const AttentionMerge* merges = nullptr;
  const AttentionKeyItem* key_items = nullptr;
  std::int64_t num_items = 0, num_merges = 0, num_key_items = 0;
  std::int64_t partial_rows = 0;  // rows of the items whose keys are split
};

struct AttentionHeads {
  std::int64_t group, num_kv_heads, block_size;
  std::int64_t window;  // 0: none
};

/// Cuts rows into tiles and, where these are too few for the device, their keys into splits; uploads all tables at
/// once.
AttentionTables attention_tables(OpContext& context, std::span<const AttentionSpan> spans, const AttentionHeads& heads,
                                 const AttentionCut& cut);

/// Where every row of the spans is stored.
std::span<const KvSlot> kv_slots(OpContext& context, std::span<const AttentionSpan> spans, std::int64_t num_kv_heads,
                                 std::int64_t block_size);

}  // namespace flexcore::cuda
