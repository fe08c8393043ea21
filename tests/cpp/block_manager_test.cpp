#include "sched/block_manager.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>

#include "flexcore/error.h"

namespace flexcore {
namespace {

using Table = std::vector<std::int32_t>;

Table sequence(std::int32_t first, std::int64_t count) {
  Table tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST(BlockManager, ReservesAllOrNothing) {
  BlockManager blocks(4, 16, true);
  Table a, b;
  EXPECT_TRUE(blocks.reserve(a, 33));
  EXPECT_EQ(a.size(), 3u);
  EXPECT_EQ(blocks.num_free(), 1);
  EXPECT_TRUE(blocks.reserve(a, 48));
  EXPECT_EQ(a.size(), 3u);
  EXPECT_FALSE(blocks.reserve(b, 17));
  EXPECT_TRUE(b.empty());
  EXPECT_TRUE(blocks.reserve(b, 0));
  EXPECT_TRUE(blocks.reserve(b, 16));
  EXPECT_FALSE(blocks.reserve(a, 49));
  EXPECT_EQ(a.size(), 3u);
  blocks.release(a);
  blocks.release(b);
  EXPECT_TRUE(a.empty());
  EXPECT_EQ(blocks.num_free(), 4);
}

TEST(BlockManager, RefusesBadArguments) {
  EXPECT_THROW(BlockManager(4, 0, true), InvalidArgument);
  EXPECT_THROW(BlockManager(-1, 16, true), InvalidArgument);
  BlockManager blocks(4, 16, true);
  Table stranger{7}, twice;
  EXPECT_THROW(blocks.release(stranger), Error);
  blocks.reserve(twice, 16);
  Table copy = twice;
  blocks.release(twice);
  EXPECT_THROW(blocks.release(copy), Error);
}

TEST(BlockManager, FindsWholeBlocksButNeverTheLastToken) {
  BlockManager blocks(8, 4, true);
  const Table tokens = sequence(10, 12);
  Table a, b;
  blocks.reserve(a, 12);
  blocks.register_blocks(1, tokens, 11, a);  // two full blocks
  EXPECT_EQ(blocks.match_prefix(1, tokens, b), 8);
  EXPECT_EQ(b, Table(a.begin(), a.begin() + 2));
  blocks.release(b);
  blocks.register_blocks(1, tokens, 12, a);
  EXPECT_EQ(blocks.match_prefix(1, tokens, b), 8);  // the row that gives the next token is always computed
  blocks.release(b);
  EXPECT_EQ(blocks.match_prefix(1, sequence(10, 13), b), 12);
  blocks.release(b);
  EXPECT_EQ(blocks.prefix_queries(), 12 + 12 + 13);
  EXPECT_EQ(blocks.prefix_hits(), 8 + 8 + 12);
  EXPECT_THROW(blocks.match_prefix(1, tokens, a), Error);
}

TEST(BlockManager, KeysAndPrefixesDoNotMix) {
  BlockManager blocks(8, 4, true);
  const Table tokens = sequence(0, 8);
  Table a, b;
  blocks.reserve(a, 8);
  blocks.register_blocks(1, tokens, 8, a);
  EXPECT_EQ(blocks.match_prefix(2, sequence(0, 9), b), 0);
  Table other = sequence(0, 9);
  other[0] = 99;  // the second block is the same, what comes before it is not
  EXPECT_EQ(blocks.match_prefix(1, other, b), 0);
  other = sequence(4, 9);  // the second block first
  EXPECT_EQ(blocks.match_prefix(1, other, b), 0);
}

TEST(BlockManager, FindPrefixCountsWithoutTaking) {
  BlockManager blocks(4, 4, true);
  const Table tokens = sequence(0, 9);
  Table a, b;
  blocks.reserve(a, 9);
  blocks.register_blocks(1, tokens, 8, a);
  EXPECT_EQ(blocks.find_prefix(1, tokens).num_tokens, 8);
  EXPECT_EQ(blocks.find_prefix(1, tokens).blocks_in_use, 2);
  blocks.release(a);
  EXPECT_EQ(blocks.find_prefix(1, tokens).num_tokens, 8);
  EXPECT_EQ(blocks.find_prefix(1, tokens).blocks_in_use, 0);
  EXPECT_EQ(blocks.num_free(), 4);
  EXPECT_EQ(blocks.prefix_queries(), 0);
}

TEST(BlockManager, FreePagesAreReusedOldestAndLastFirst) {
  BlockManager blocks(4, 4, true);
  const Table first = sequence(0, 9), second = sequence(100, 9);
  Table a, b, c;
  blocks.reserve(a, 8);
  blocks.register_blocks(1, first, 8, a);
  blocks.reserve(b, 8);
  blocks.register_blocks(1, second, 8, b);
  blocks.release(a);
  blocks.release(b);
  blocks.reserve(c, 4);  // takes the end of the first
  EXPECT_EQ(blocks.find_prefix(1, first).num_tokens, 4);
  EXPECT_EQ(blocks.find_prefix(1, second).num_tokens, 8);
  Table d;
  EXPECT_EQ(blocks.match_prefix(1, first, d), 4);  // in use again: not the next to go
  blocks.release(d);
  Table e;
  blocks.reserve(e, 8);
  EXPECT_EQ(blocks.find_prefix(1, first).num_tokens, 4);
  EXPECT_EQ(blocks.find_prefix(1, second).num_tokens, 0);
}

TEST(BlockManager, ForgetDropsAKeyAndKeepsTheRest) {
  BlockManager blocks(8, 4, true);
  const Table tokens = sequence(0, 9);
  Table a, b;
  blocks.reserve(a, 9);
  blocks.register_blocks(1, tokens, 8, a);
  blocks.reserve(b, 9);
  blocks.register_blocks(2, tokens, 8, b);
  blocks.release(b);
  blocks.forget(1);  // a is still in use
  EXPECT_EQ(blocks.find_prefix(1, tokens).num_tokens, 0);
  EXPECT_EQ(blocks.find_prefix(2, tokens).num_tokens, 8);
  blocks.forget(2);  // b is free
  EXPECT_EQ(blocks.find_prefix(2, tokens).num_tokens, 0);
  blocks.release(a);
  EXPECT_EQ(blocks.num_free(), 8);
}

TEST(BlockManager, TwinsShareOneName) {
  BlockManager blocks(8, 4, true);
  const Table tokens = sequence(0, 13);
  Table a, b, c;
  blocks.reserve(a, 13);
  blocks.reserve(b, 13);
  blocks.register_blocks(1, tokens, 8, a);
  blocks.register_blocks(1, tokens, 12, b);  // its first two blocks are copies, its third is new
  EXPECT_EQ(blocks.match_prefix(1, tokens, c), 12);
  EXPECT_EQ(c, (Table{a[0], a[1], b[2]}));
  blocks.release(a);
  blocks.release(b);
  blocks.release(c);
  EXPECT_EQ(blocks.num_free(), 8);
}

TEST(BlockManager, OffMeansOff) {
  BlockManager blocks(4, 4, false);
  const Table tokens = sequence(0, 9);
  Table a, b;
  blocks.reserve(a, 9);
  blocks.register_blocks(1, tokens, 8, a);
  EXPECT_EQ(blocks.match_prefix(1, tokens, b), 0);
  EXPECT_EQ(blocks.prefix_queries(), 0);
  blocks.forget(1);
}

// Few distinct tokens and a tiny pool, against a model that remembers what was last written to every page.
TEST(BlockManager, RandomUseNeverGivesWrongContent) {
  std::mt19937 random(7);
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  struct User {
    std::uint64_t key;
    Table tokens, table;
  };
  for (int round = 0; round < 20; ++round) {
    const int block_size = 1 + pick(4), pool = 4 + pick(20);
    BlockManager blocks(pool, block_size, true);
    std::vector<User> users;
    std::map<std::int32_t, std::pair<std::uint64_t, Table>> content;  // page -> key, all tokens up to its end
    for (int action = 0; action < 400; ++action) {
      if (const int kind = pick(10); kind < 5) {
        User user{static_cast<std::uint64_t>(pick(2)), Table(static_cast<std::size_t>(1 + pick(20))), {}};
        for (auto& token : user.tokens) token = pick(2);
        const auto expected = blocks.find_prefix(user.key, user.tokens);
        const std::int64_t found = blocks.match_prefix(user.key, user.tokens, user.table);
        ASSERT_EQ(found, expected.num_tokens);
        for (std::size_t i = 0; i < user.table.size(); ++i) {
          const auto end = static_cast<std::ptrdiff_t>(i + 1) * block_size;
          ASSERT_EQ(content[user.table[i]], std::pair(user.key, Table(user.tokens.begin(), user.tokens.begin() + end)));
        }
        const auto length = static_cast<std::int64_t>(user.tokens.size());
        const std::size_t known = user.table.size();
        if (!blocks.reserve(user.table, length)) {
          blocks.release(user.table);
          continue;
        }
        for (std::size_t i = known; i < user.table.size(); ++i) {
          const auto end = std::min<std::ptrdiff_t>(static_cast<std::ptrdiff_t>(i + 1) * block_size, length);
          content[user.table[i]] = {user.key, Table(user.tokens.begin(), user.tokens.begin() + end)};
        }
        blocks.register_blocks(user.key, user.tokens, found + pick(static_cast<int>(length - found) + 1), user.table);
        users.push_back(std::move(user));
      } else if (kind < 9 && !users.empty()) {
        const auto index = static_cast<std::size_t>(pick(static_cast<int>(users.size())));
        User& user = users[index];
        blocks.register_blocks(user.key, user.tokens, static_cast<std::int64_t>(user.tokens.size()), user.table);
        blocks.release(user.table);
        users.erase(users.begin() + static_cast<std::ptrdiff_t>(index));
      } else if (pick(10) == 0) {
        blocks.forget(static_cast<std::uint64_t>(pick(2)));
      }
      std::map<std::int32_t, int> held;
      for (const User& user : users)
        for (const std::int32_t page : user.table) ++held[page];
      ASSERT_EQ(blocks.num_free(), pool - static_cast<int>(held.size()));
    }
  }
}

TEST(BlockManager, RunsAreAboveSinglePages) {
  BlockManager blocks(10, 4, true);
  std::vector<BlockMove> moves;
  Table a;
  blocks.reserve(a, 8);
  EXPECT_EQ(a, (Table{0, 1}));
  BlockRun run = blocks.reserve_run(3, moves), other = blocks.reserve_run(5, moves);
  EXPECT_EQ(run.first, 7);
  EXPECT_EQ(other.first, 2);
  EXPECT_EQ(blocks.num_free(), 0);
  EXPECT_TRUE(moves.empty());
  EXPECT_FALSE(blocks.reserve_run(1, moves));
  blocks.release_run(run);
  EXPECT_FALSE(run);
  EXPECT_EQ(blocks.num_free(), 3);
  EXPECT_FALSE(blocks.reserve_run(0, moves));
  blocks.release_run(other);
  Table b;
  blocks.reserve(b, 4);
  EXPECT_EQ(b, Table{2});  // the lowest, so that runs find room
  BlockRun stranger{0, 1};
  EXPECT_THROW(blocks.release_run(stranger), Error);
}

TEST(BlockManager, PagesInTheWayAreMovedAndFoundAgain) {
  BlockManager blocks(8, 4, true);
  const Table first = sequence(0, 8), second = sequence(100, 8);
  Table a, b, c;
  blocks.reserve(a, 8), blocks.reserve(b, 8), blocks.reserve(c, 16);
  blocks.register_blocks(1, first, 8, a);
  blocks.register_blocks(1, second, 8, b);
  blocks.release(a);  // free, still findable: 0, 1
  Table tail(c.begin() + 2, c.end());
  c.resize(2);
  blocks.release(tail);  // 6, 7
  // Free are 0, 1, 6, 7. Three next to each other: 5 has to go.
  std::vector<BlockMove> moves;
  const BlockRun run = blocks.reserve_run(3, moves);
  EXPECT_EQ(run.first, 5);
  ASSERT_EQ(moves.size(), 1u);
  EXPECT_EQ(moves[0].from, 5);
  EXPECT_EQ(moves[0].to, 1);  // of the free pages with content, the least recently used: ends go before beginnings
  EXPECT_EQ(blocks.num_free(), 1);
  // And four: all of b's move, and are found where they are now.
  BlockRun given = run;
  blocks.release_run(given);
  moves.clear();
  const BlockRun again = blocks.reserve_run(4, moves);
  EXPECT_EQ(again.count, 4);
  for (auto& page : b)
    for (const auto& move : moves)
      if (move.from == page) {
        page = move.to;
        break;
      }
  Table found;
  EXPECT_EQ(blocks.match_prefix(1, sequence(100, 9), found), 8);
  EXPECT_EQ(found, b);
}

TEST(BlockManager, RunsInHostMemoryMoveWhatWasSwappedOut) {
  BlockManager blocks(6, 4, false, 6);
  std::vector<BlockMove> moves;
  Table a, b, host_a, host_b;
  BlockRun none;
  blocks.reserve(a, 12), blocks.reserve(b, 4);
  ASSERT_TRUE(blocks.swap_out(a, none, host_a, moves) && blocks.swap_out(b, none, host_b, moves));
  EXPECT_EQ(host_a, (Table{6, 7, 8}));
  EXPECT_EQ(host_b, Table{9});
  blocks.release(host_a);
  EXPECT_EQ(blocks.num_free_host(), 5);
  // Free are 6..8, 10 and 11: for four next to each other, 9 has to go.
  moves.clear();
  BlockRun run = blocks.reserve_run(4, moves, Tier::kHost);
  EXPECT_TRUE(run.first == 8 && run.count == 4);
  ASSERT_EQ(moves.size(), 1u);
  EXPECT_TRUE(moves[0].from == 9 && moves[0].to == 6);
  EXPECT_EQ(blocks.num_free_host(), 1);
  EXPECT_EQ(blocks.num_free(), 6);
  EXPECT_FALSE(blocks.reserve_run(2, moves, Tier::kHost));
  host_b[0] = 6;
  blocks.release(host_b);
  blocks.release_run(run);
  EXPECT_EQ(blocks.num_free_host(), 6);
  EXPECT_EQ(blocks.reserve_run(6, moves, Tier::kHost).first, 6);
}

TEST(BlockManager, ARunDoesNotReachThroughAnother) {
  BlockManager blocks(7, 4, false);
  std::vector<BlockMove> moves;
  BlockRun above = blocks.reserve_run(3, moves), middle = blocks.reserve_run(1, moves);
  EXPECT_EQ(middle.first, 3);
  blocks.release_run(above);  // free are 0..2 and 4..6
  EXPECT_EQ(blocks.num_free(), 6);
  EXPECT_FALSE(blocks.reserve_run(4, moves));
  EXPECT_TRUE(moves.empty());
  EXPECT_EQ(blocks.num_free(), 6);
  EXPECT_EQ(blocks.reserve_run(3, moves).first, 4);
}

}  // namespace
}  // namespace flexcore
