#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "memory/tier.h"

namespace flexcore {

/// Pages next to each other, for what is no keys and values.
struct BlockRun {
  std::int32_t first = 0;
  std::int64_t count = 0;
  explicit operator bool() const { return count > 0; }
};

/// A page whose content goes to another. Pages from num_blocks() on are in host memory.
struct BlockMove {
  std::int32_t from, to;
};

/// Which page of the pool belongs to whom. Pages are counted by reference; full pages of inference sequences can be
/// found again by content: (cache_key, all tokens up to the block's end). Free pages keep their content until they are
/// reused: pages without content first, then the least recently used. Not thread-safe.
///
/// Behind the pool's pages, [0, num_blocks), are those of host memory, [num_blocks, num_blocks + num_host_blocks),
/// which keep what was swapped out, and runs of what training has no room for on the device.
class BlockManager {
 public:
  /// Throws InvalidArgument unless num_blocks >= 0, block_size >= 1 and num_host_blocks >= 0.
  BlockManager(std::int64_t num_blocks, std::int64_t block_size, bool enable_prefix_caching,
               std::int64_t num_host_blocks = 0);

  std::int64_t num_blocks() const { return num_blocks_; }
  std::int64_t block_size() const { return block_size_; }
  /// Pages that nobody references, cached ones included.
  std::int64_t num_free() const { return static_cast<std::int64_t>(blank_.size()) + lru_size_; }
  /// Pages that hold `num_tokens` tokens.
  std::int64_t blocks_for(std::int64_t num_tokens) const { return (num_tokens + block_size_ - 1) / block_size_; }

  /// Makes block_table long enough for `num_tokens`. False, and nothing changed, when there are too few free pages.
  bool reserve(std::vector<std::int32_t>& block_table, std::int64_t num_tokens);
  /// Gives every page of a table, or of a host table, back and clears it.
  void release(std::vector<std::int32_t>& block_table);

  /// `count` pages of a tier next to each other. Where free ones lie apart, pages in use are moved out of the way:
  /// `moves` gets them, to be copied in this order, and tables renumbered. Empty, and nothing changed, when there are
  /// too few free pages or other runs lie in between.
  BlockRun reserve_run(std::int64_t count, std::vector<BlockMove>& moves, Tier tier = Tier::kDevice);
  /// Gives a run back and clears it.
  void release_run(BlockRun& run);

  /// Sends pages that nobody shares, and a run, to host pages, and gives them back: `moves` gets the copies, in order,
  /// and `host_table` the host pages, the table's first. False, and nothing changed, when too few of those are free.
  bool swap_out(std::vector<std::int32_t>& block_table, BlockRun& run, std::vector<std::int32_t>& host_table,
                std::vector<BlockMove>& moves);
  /// The way back, to as many pages, which are reserved before. Gives the host pages back and clears their table.
  void swap_in(std::vector<std::int32_t>& host_table, std::span<const std::int32_t> block_table, const BlockRun& run,
               std::vector<BlockMove>& moves);
  std::int64_t num_host_blocks() const { return num_host_blocks_; }
  std::int64_t num_free_host() const { return static_cast<std::int64_t>(blank_host_.size()); }

  /// Longest cached prefix of `tokens` in whole blocks, at most tokens.size() - 1 tokens; its pages are referenced and
  /// put in `block_table` (empty before). Returns the number of tokens found.
  std::int64_t match_prefix(std::uint64_t cache_key, std::span<const std::int32_t> tokens,
                            std::vector<std::int32_t>& block_table);
  struct Prefix {
    std::int64_t num_tokens = 0;     // that match_prefix would find
    std::int64_t blocks_in_use = 0;  // of its pages, those that somebody references: they cost no free page
  };
  /// What match_prefix would do, without doing or counting it.
  Prefix find_prefix(std::uint64_t cache_key, std::span<const std::int32_t> tokens) const;

  /// Makes the full blocks of tokens[0, num_computed) findable. Cheap to repeat: it goes on after the last known block.
  void register_blocks(std::uint64_t cache_key, std::span<const std::int32_t> tokens, std::int64_t num_computed,
                       std::span<const std::int32_t> block_table);
  /// Forgets every cached block of a key (an adapter version that is gone).
  void forget(std::uint64_t cache_key);

  std::int64_t prefix_queries() const { return prefix_queries_; }  // tokens asked for
  std::int64_t prefix_hits() const { return prefix_hits_; }        // tokens found

 private:
  struct Page {
    std::int32_t references = 0;
    std::int32_t previous = -1, next = -1;  // in the list of free cached pages
    std::int32_t bucket_next = -1;
    bool cached = false;  // in a bucket
    bool in_run = false;
    std::uint64_t serial = 0;  // names the content (key, prefix, own tokens); 0: not known
    std::uint64_t parent = 0;  // serial of the block before; 0: this is the first
    std::uint64_t key = 0;
    std::size_t bucket = 0;
  };

  std::int32_t allocate(Tier tier = Tier::kDevice);
  Tier tier_of(std::int32_t page) const { return page < num_blocks_ ? Tier::kDevice : Tier::kHost; }
  std::vector<std::int32_t>& blank(Tier tier) { return tier == Tier::kDevice ? blank_ : blank_host_; }
  std::int32_t lookup(std::uint64_t key, std::uint64_t parent, const std::int32_t* tokens) const;
  std::size_t bucket_of(std::uint64_t key, std::uint64_t parent, const std::int32_t* tokens) const;
  void move(std::int32_t from, std::int32_t to);
  void uncache(std::int32_t page);
  void push_free(std::int32_t page);
  void unlink(std::int32_t page);
  Page& checked(std::int32_t page);

  std::int64_t block_size_;
  bool caching_;
  std::vector<Page> pages_;             // of both tiers
  std::vector<std::int32_t> contents_;  // [num_blocks, block_size] tokens of cached pages
  std::vector<std::int32_t> buckets_;   // first page of each chain, or -1; a power of two of them
  // Free pages without content: heaps, the lowest first, so that runs find room above.
  std::vector<std::int32_t> blank_, blank_host_;
  std::int32_t lru_first_ = -1, lru_last_ = -1;
  std::int64_t lru_size_ = 0;
  std::int64_t num_blocks_ = 0, num_host_blocks_ = 0;
  std::uint64_t next_serial_ = 1;
  std::int64_t prefix_queries_ = 0, prefix_hits_ = 0;
};

}  // namespace flexcore
