#include "backends/cuda/attention_tables.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

using namespace cuda;

struct Shape {
  AttentionHeads heads;
  AttentionCut cut;
  bool wants_splits = false;
};

const AttentionCut kCut{.tile_rows = {16, 32, 64, 128}, .key_tile = 128, .owned_keys = 64, .slots = 8};

// Every (row, key it sees) is in one item; splits of a row are merged in ascending order; every key that a row sees has
// one owner.
void check_tables(const Shape& shape, const std::vector<AttentionSpan>& spans) {
  OpFixture ops(1);
  const AttentionTables tables = attention_tables(ops.context(), spans, shape.heads, shape.cut);
  test_runtime().synchronize();
  const simt::DeviceAccess access;
  EXPECT_EQ(tables.num_merges > 0, shape.wants_splits);
  std::map<std::pair<int, int>, std::map<int, const AttentionItem*>> of_row;  // (span's row, row) -> by first key
  for (std::int64_t i = 0; i < tables.num_items; ++i) {
    const AttentionItem& item = tables.items[i];
    const AttentionItem& before = tables.items[std::max<std::int64_t>(i - 1, 0)];
    EXPECT_GE(before.key_end - before.key_begin, item.key_end - item.key_begin);
    ASSERT_LE(item.num_rows, item.tile_rows);
    ASSERT_LT(item.key_begin, item.key_end);
    for (int row = 0; row < item.num_rows; ++row)
      EXPECT_TRUE(of_row[std::pair(item.span_row, item.row_begin + row)].emplace(item.key_begin, &item).second);
  }
  std::map<std::pair<int, int>, std::pair<AttentionMerge, int>> merges;
  for (std::int64_t i = 0; i < tables.num_merges; ++i)
    for (int row = 0; row < tables.merges[i].num_rows; ++row)
      merges[std::pair(tables.merges[i].span_row, tables.merges[i].row_begin + row)] = {tables.merges[i], row};
  std::map<std::pair<int, int>, int> owners;  // (window, key)
  for (std::int64_t i = 0; i < tables.num_key_items; ++i) {
    EXPECT_LE(tables.key_items[i].key_end - tables.key_items[i].key_begin, shape.cut.owned_keys);
    for (int key = tables.key_items[i].key_begin; key < tables.key_items[i].key_end; ++key)
      ++owners[std::pair(tables.key_items[i].window, key)];
  }
  for (std::size_t s = 0; s < spans.size(); ++s) {
    const auto& span = spans[s];
    for (std::int64_t row = 0; row < (span.row_end - span.row_begin) * shape.heads.group; ++row) {
      const std::int64_t position = span.position + row / shape.heads.group;
      const std::int64_t oldest =
          shape.heads.window > 0 ? std::max<std::int64_t>(position - shape.heads.window + 1, 0) : 0;
      const std::pair at(static_cast<int>(span.row_begin), static_cast<int>(row));
      std::int64_t seen = oldest, index = 0;
      for (const auto& [begin, item] : of_row.at(at)) {
        EXPECT_LE(begin, seen);
        seen = item->key_end;
        EXPECT_EQ(item->position, span.position);
        EXPECT_TRUE(item->key_end % shape.cut.key_tile == 0 || item->key_end > position);
        EXPECT_EQ(tables.block_tables[item->table], span.block_table[0]);
        if (of_row.at(at).size() == 1) {
          EXPECT_EQ(item->partial, -1);
          continue;
        }
        const auto& [merge, lane] = merges.at(at);
        EXPECT_EQ(merge.num_splits, static_cast<int>(of_row.at(at).size()));
        EXPECT_EQ(item->partial + at.second - item->row_begin,
                  merge.partial + static_cast<int>(index) * merge.split_rows + lane);
        EXPECT_LE(item->partial + item->num_rows, tables.partial_rows);
        ++index;
      }
      EXPECT_GT(seen, position);
      for (std::int64_t key = oldest; key <= position; ++key)
        EXPECT_EQ(owners[std::pair(static_cast<int>(s), static_cast<int>(key))], 1);
    }
  }
}

TEST(AttentionTables, CoverEveryRowAndKeyOnce) {
  std::vector<std::int32_t> table(300);
  std::iota(table.begin(), table.end(), 7);
  const std::vector<AttentionSpan> one{{0, 1, 1999, table.data()}};
  const std::vector<AttentionSpan> mixed{{3, 4, 700, table.data()},     {4, 4, 0, nullptr},
                                         {4, 74, 30, table.data() + 9}, {80, 81, 0, table.data()},
                                         {81, 99, 250, table.data()},   {100, 101, 127, table.data()},
                                         {101, 102, 128, table.data()}};
  for (const std::int64_t group : {1, 4, 7, 24}) {
    for (const std::int64_t window : {0, 1, 90, 5000}) {
      const AttentionHeads heads{.group = group, .num_kv_heads = 2, .block_size = 16, .window = window};
      check_tables({heads, kCut, window != 1 && window != 90}, one);
      check_tables({heads, {.tile_rows = {32}, .key_tile = 32, .owned_keys = 32, .slots = 1}}, mixed);
    }
  }
}

// Long prefills need no splits; where blocks are few, tiles shrink before keys are split.
TEST(AttentionTables, SplitsOnlyWhereBlocksAreFew) {
  std::vector<std::int32_t> table(300);
  std::iota(table.begin(), table.end(), 0);
  const AttentionHeads heads{.group = 4, .num_kv_heads = 8, .block_size = 16, .window = 0};
  check_tables({heads, kCut}, {{0, 1000, 0, table.data()}});
  check_tables({{.group = 4, .num_kv_heads = 1, .block_size = 16, .window = 0}, kCut, true},
               {{0, 8, 1500, table.data()}});
  OpFixture ops(1);
  const std::vector<AttentionSpan> prompt{{0, 32, 0, table.data()}};
  const auto tables = attention_tables(ops.context(), prompt, {.group = 4, .num_kv_heads = 1, .block_size = 16}, kCut);
  test_runtime().synchronize();
  const simt::DeviceAccess access;
  EXPECT_EQ(tables.num_items, 8);
  EXPECT_EQ(tables.items[0].tile_rows, 16);
}

}  // namespace
}  // namespace flexcore::test
