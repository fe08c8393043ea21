#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flexcore {

/// Which page of the pool belongs to whom. Pages are counted by reference; full pages of inference sequences can be found again by content:
/// key = hash chain of (cache_key, tokens up to the block's end). Free pages keep their content until they are reused, oldest first.
class BlockManager {
 public:
  BlockManager(std::int64_t num_blocks, std::int64_t block_size, bool enable_prefix_caching);

  std::int64_t num_blocks() const;
  std::int64_t block_size() const;
  std::int64_t num_free() const;  // pages that nobody references, cached ones included

  /// Makes block_table long enough for `num_tokens`. False, and nothing changed, when there are too few free pages.
  bool reserve(std::vector<std::int32_t>& block_table, std::int64_t num_tokens);
  /// Gives every page back and clears the table.
  void release(std::vector<std::int32_t>& block_table);

  /// Longest cached prefix of `tokens` in whole blocks, at most tokens.size() - 1 tokens; its pages are referenced and put in `block_table` (empty before).
  /// Returns the number of tokens found.
  std::int64_t match_prefix(std::uint64_t cache_key, std::span<const std::int32_t> tokens, std::vector<std::int32_t>& block_table);
  /// Makes the full blocks of tokens[0, num_computed) findable.
  void register_blocks(std::uint64_t cache_key, std::span<const std::int32_t> tokens, std::int64_t num_computed,
                       std::span<const std::int32_t> block_table);
  /// Forgets every cached block of a key (an adapter version that is gone).
  void forget(std::uint64_t cache_key);

  std::int64_t prefix_queries() const;  // tokens asked for
  std::int64_t prefix_hits() const;     // tokens found
};

}  // namespace flexcore
