#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "backends/cuda/attention_tables.h"
#include "backends/cuda/scratch.h"
#include "backends/cuda/tables.h"
#include "core/number.h"

namespace flexcore::cuda {

namespace {

/// Key tiles that are not worth a split: its merge costs about as much as reading them.
constexpr std::int64_t kLeastKeyTiles = 2;

int to_int(std::int64_t x) {
  require<Unsupported>(x <= INT_MAX, "attention: ", x, " rows or positions, wanted at most ", INT_MAX);
  return static_cast<int>(x);
}

class AttentionPlan {
 public:
  AttentionPlan(std::span<const AttentionSpan> spans, const AttentionHeads& heads, const AttentionCut& cut)
      : spans_(spans), heads_(heads), cut_(cut) {
    for (const auto& span : spans) {
      tables_.push_back(to_int(static_cast<std::int64_t>(blocks_.size())));
      const std::int64_t tokens = span.row_end - span.row_begin;
      to_int(span.position + tokens), to_int(span.row_end * heads.group);
      if (tokens > 0)
        blocks_.insert(blocks_.end(), span.block_table,
                       span.block_table + divide_up(span.position + tokens, heads.block_size));
    }
    cut_rows();
    if (cut.owned_keys > 0) cut_keys();
  }

  HostTables tables() const { return HostTables().add(blocks_).add(items_).add(merges_).add(key_items_); }
  bool fits(const AttentionPlan& recorded) const { return partial_rows_ <= recorded.partial_room(); }
  /// Rows of partial results that a launch has memory for; more than there are, so that a recording serves longer.
  std::int64_t partial_room() const {
    return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::size_t>(partial_rows_)));
  }

 private:
  struct Keys {
    std::int64_t begin, end;
  };
  /// That tokens [first, last] of a span see.
  Keys keys_of(const AttentionSpan& span, std::int64_t first, std::int64_t last) const {
    const std::int64_t oldest = heads_.window > 0 ? span.position + first - heads_.window + 1 : 0;
    return {std::max<std::int64_t>(oldest, 0), span.position + last + 1};
  }
  std::int64_t key_tiles(const Keys& keys) const {
    return divide_up(keys.end, cut_.key_tile) - keys.begin / cut_.key_tile;
  }

  /// f(span's index, first row, rows, size of the tile, keys) for tiles of up to `tile_rows` rows.
  template <class F>
  void for_each_tile(int tile_rows, F&& f) const {
    for (std::size_t s = 0; s < spans_.size(); ++s) {
      const auto& span = spans_[s];
      const std::int64_t rows = (span.row_end - span.row_begin) * heads_.group;
      for (std::int64_t begin = 0; begin < rows; begin += tile_rows) {
        const std::int64_t count = std::min<std::int64_t>(tile_rows, rows - begin);
        const int size =
            *std::find_if(cut_.tile_rows.begin(), cut_.tile_rows.end(), [&](int option) { return option >= count; });
        f(s, begin, count, size, keys_of(span, begin / heads_.group, (begin + count - 1) / heads_.group));
      }
    }
  }
  /// Key tiles of all blocks together: what their time is about proportional to, bound by memory or not.
  std::int64_t work(int tile_rows) const {
    std::int64_t total = 0;
    for_each_tile(tile_rows, [&](auto, auto, auto, auto, const Keys& keys) { total += key_tiles(keys); });
    return total * heads_.num_kv_heads;
  }

  void cut_rows() {
    // Large tiles read keys less often; smaller ones where there is not even a key tile for every block.
    int option = 3;
    while (cut_.tile_rows[option] == 0) --option;
    std::int64_t total = work(cut_.tile_rows[option]);
    while (option > 0 && total < cut_.slots) total = work(cut_.tile_rows[--option]);
    const std::int64_t share = std::max(kLeastKeyTiles, divide_up(total, cut_.slots));
    for_each_tile(cut_.tile_rows[option],
                  [&](std::size_t s, std::int64_t begin, std::int64_t count, int size, const Keys& keys) {
                    const std::int64_t tiles = key_tiles(keys);
                    add_tile(s, begin, count, size, keys, 4 * tiles > 5 * share ? divide_up(tiles, share) : 1);
                  });
    std::stable_sort(items_.begin(), items_.end(), [](const AttentionItem& a, const AttentionItem& b) {
      return a.key_end - a.key_begin > b.key_end - b.key_begin;
    });
  }

  void add_tile(std::size_t s, std::int64_t begin, std::int64_t count, int size, const Keys& keys,
                std::int64_t num_splits) {
    const AttentionSpan& span = spans_[s];
    AttentionItem item{.span_row = static_cast<int>(span.row_begin),
                       .position = static_cast<int>(span.position),
                       .table = tables_[s],
                       .row_begin = static_cast<int>(begin),
                       .num_rows = static_cast<int>(count),
                       .tile_rows = size,
                       .key_begin = static_cast<int>(keys.begin),
                       .key_end = static_cast<int>(keys.end),
                       .partial = -1};
    if (num_splits == 1) {
      items_.push_back(item);
      return;
    }
    const std::int64_t first = keys.begin / cut_.key_tile, length = divide_up(key_tiles(keys), num_splits);
    num_splits = divide_up(key_tiles(keys), length);
    const std::int64_t partial = partial_rows_;
    for (std::int64_t i = 0; i < num_splits; ++i) {
      item.key_begin = static_cast<int>(std::max((first + i * length) * cut_.key_tile, keys.begin));
      item.key_end = static_cast<int>(std::min((first + (i + 1) * length) * cut_.key_tile, keys.end));
      item.partial = to_int(partial_rows_);
      partial_rows_ += count;
      items_.push_back(item);
    }
    for (std::int64_t row = 0; row < count; row += kMergeRows)
      merges_.push_back({.span_row = item.span_row,
                         .row_begin = static_cast<int>(begin + row),
                         .num_rows = static_cast<int>(std::min<std::int64_t>(kMergeRows, count - row)),
                         .partial = static_cast<int>(partial + row),
                         .num_splits = static_cast<int>(num_splits),
                         .split_rows = static_cast<int>(count)});
  }

  void cut_keys() {
    for (std::size_t s = 0; s < spans_.size(); ++s) {
      const auto& span = spans_[s];
      const std::int64_t tokens = span.row_end - span.row_begin;
      if (tokens == 0) continue;
      const Keys keys = keys_of(span, 0, tokens - 1);
      for (std::int64_t begin = keys.begin / cut_.owned_keys * cut_.owned_keys; begin < keys.end;
           begin += cut_.owned_keys)
        key_items_.push_back({.span_row = static_cast<int>(span.row_begin),
                              .num_tokens = static_cast<int>(tokens),
                              .position = static_cast<int>(span.position),
                              .table = tables_[s],
                              .window = static_cast<int>(s),
                              .key_begin = static_cast<int>(std::max(begin, keys.begin)),
                              .key_end = static_cast<int>(std::min(begin + cut_.owned_keys, keys.end))});
    }
    // Keys before a window are seen by all of its rows, the last ones by few.
    const auto tokens_of = [](const AttentionKeyItem& i) {
      return i.num_tokens - std::max(i.key_begin - i.position, 0);
    };
    std::stable_sort(key_items_.begin(), key_items_.end(),
                     [&](const auto& a, const auto& b) { return tokens_of(a) > tokens_of(b); });
  }

  std::span<const AttentionSpan> spans_;
  AttentionHeads heads_;
  AttentionCut cut_;
  std::vector<std::int32_t> blocks_;
  std::vector<int> tables_;  // where each span's pages begin
  std::vector<AttentionItem> items_;
  std::vector<AttentionMerge> merges_;
  std::vector<AttentionKeyItem> key_items_;
  std::int64_t partial_rows_ = 0;
};

AttentionTables tables_of(const Placed<AttentionPlan>& placed) {
  const DeviceTables& device = placed.device;
  return {.block_tables = device.get<std::int32_t>(0),
          .items = device.get<AttentionItem>(1),
          .merges = device.get<AttentionMerge>(2),
          .key_items = device.get<AttentionKeyItem>(3),
          .num_items = device.count(1),
          .num_merges = device.count(2),
          .num_key_items = device.count(3),
          .partial_rows = device.count(2) > 0 ? placed.plan.partial_room() : 0};
}

struct KvSlotPlan {
  std::vector<KvSlot> slots;
  HostTables tables() const { return HostTables().add(slots, 0xff); }
  bool fits(const KvSlotPlan&) const { return true; }
};

KvSlotPlan plan_slots(std::span<const AttentionSpan> spans, std::int64_t page_rows, std::int64_t block_size) {
  KvSlotPlan plan;
  for (const auto& span : spans) {
    for (std::int64_t row = span.row_begin; row < span.row_end; ++row) {
      const std::int64_t position = span.position + row - span.row_begin;
      plan.slots.push_back({row, span.block_table[position / block_size] * page_rows + position % block_size});
    }
  }
  return plan;
}

// A kernel's tiles have at most so many rows, and so many blocks of it live on a multiprocessor.
constexpr std::int64_t kMostTileRows = 128, kMostBlocks = 2;

}  // namespace

// Items: a tile of at least 16 rows, or the last of a span, each; a tile is split when it has over 5/4 of a block's
// share, so the splits are under 9/5 of the blocks. As many sequences as may be sampled. Kept for keys of two kinds
// (with and without a sliding window).
std::int64_t attention_tables_bytes(const ScratchShape& s, const DeviceSize& device) {
  constexpr std::int64_t kSplits = 2, kKinds = 2, kLeastOwnedKeys = 16;
  const std::int64_t blocks = kMostBlocks * device.num_multiprocessors, group = s.num_heads / s.num_kv_heads;
  const std::int64_t items = s.rows * (group / 16 + 1) + s.rows + kSplits * blocks;
  const std::int64_t merges = kSplits * blocks * kMostTileRows / kMergeRows;
  const std::int64_t key_items = s.sampled_rows * (divide_up(s.positions, kLeastOwnedKeys) + 1);
  const std::int64_t pages = s.sampled_rows * divide_up(s.positions, s.block_size);
  const auto bytes = [](std::int64_t count, std::size_t size) { return count * static_cast<std::int64_t>(size) + 64; };
  return kKinds * (bytes(items, sizeof(AttentionItem)) + bytes(merges, sizeof(AttentionMerge)) +
                   bytes(key_items, sizeof(AttentionKeyItem)) + bytes(pages, sizeof(std::int32_t))) +
         s.rows * 64;  // and where each row's keys, values and saved tensors go
}

std::int64_t attention_scratch(const ScratchShape& s, const DeviceSize& device) {
  // Rows of partial results: of the splits above, up to a power of two.
  const std::int64_t rows = 2 * 2 * kMostBlocks * device.num_multiprocessors * kMostTileRows;
  return rows * (s.head_dim + 2) * static_cast<std::int64_t>(sizeof(float)) +
         s.rows * (s.num_heads * static_cast<std::int64_t>(sizeof(float)) + 16) +
         2 * s.rows * s.num_heads * s.head_dim;  // the gradient of y in bfloat16
}

AttentionTables attention_tables(OpContext& context, std::span<const AttentionSpan> spans, const AttentionHeads& heads,
                                 const AttentionCut& cut) {
  static const char what = 0;
  const auto key =
      batch_key(&what, spans,
                {heads.group, heads.num_kv_heads, heads.block_size, heads.window, cut.tile_rows[0], cut.tile_rows[1],
                 cut.tile_rows[2], cut.tile_rows[3], cut.key_tile, cut.owned_keys, cut.slots});
  return tables_of(*place_once(context, key, [=] { return AttentionPlan(spans, heads, cut); }));
}

AttentionTables attention_tables_of_call(OpContext& context, std::vector<AttentionSpan> spans,
                                         const AttentionHeads& heads, const AttentionCut& cut) {
  return tables_of(
      *place(context, [spans = std::move(spans), heads, cut] { return AttentionPlan(spans, heads, cut); }));
}

KvSlots kv_slots(OpContext& context, std::span<const AttentionSpan> spans, std::int64_t page_rows,
                 std::int64_t block_size) {
  static const char what = 0;
  const auto placed = place_once(context, batch_key(&what, spans, {page_rows, block_size}),
                                 [=] { return plan_slots(spans, page_rows, block_size); });
  return {placed->device.get<KvSlot>(0), placed->device.count(0)};
}

}  // namespace flexcore::cuda
