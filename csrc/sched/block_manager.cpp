#include "sched/block_manager.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "core/check.h"

namespace flexcore {

// Identity of content. Each cached page has a serial that is never used again, and is found by (key, serial of the page
// before, own tokens), all three compared. By induction a hit has the same tokens from the beginning on: the hash only
// picks the chain to look in, so that no collision can give wrong pages.

BlockManager::BlockManager(std::int64_t num_blocks, std::int64_t block_size, bool enable_prefix_caching,
                           std::int64_t num_host_blocks)
    : block_size_(block_size),
      caching_(enable_prefix_caching),
      num_blocks_(num_blocks),
      num_host_blocks_(num_host_blocks) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(num_blocks >= 0 && num_blocks <= kMost, "BlockManager: num_blocks is ", num_blocks, ", wanted 0 to 2^31 - 1");
  require(num_host_blocks >= 0 && num_host_blocks <= kMost - num_blocks, "BlockManager: num_host_blocks is ",
          num_host_blocks, ", wanted 0 to ", kMost - num_blocks);
  require(block_size >= 1, "BlockManager: block_size is ", block_size, ", wanted at least 1");
  pages_.resize(static_cast<std::size_t>(num_blocks + num_host_blocks));
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(pages_.size()); ++i) blank(tier_of(i)).push_back(i);
  if (caching_) {
    contents_.resize(static_cast<std::size_t>(num_blocks * block_size));
    buckets_.assign(std::bit_ceil(static_cast<std::size_t>(2 * num_blocks + 1)), -1);
  }
}

bool BlockManager::reserve(std::vector<std::int32_t>& block_table, std::int64_t num_tokens) {
  const std::int64_t missing = blocks_for(num_tokens) - static_cast<std::int64_t>(block_table.size());
  if (missing <= 0) return true;
  if (missing > num_free()) return false;
  for (std::int64_t i = 0; i < missing; ++i) block_table.push_back(allocate());
  return true;
}

void BlockManager::release(std::vector<std::int32_t>& block_table) {
  // From the back, so that the end of a sequence is reused before its beginning: others share the beginning more often,
  // and a cached page whose predecessor is gone can no longer be found.
  for (auto it = block_table.rbegin(); it != block_table.rend(); ++it) {
    Page& page = checked(*it);
    require<Error>(page.references > 0, "BlockManager.release: page ", *it, " is free already");
    if (--page.references == 0) push_free(*it);
  }
  block_table.clear();
}

// The window with the fewest pages in use; of equal ones the last, as single pages are taken from below.
BlockRun BlockManager::reserve_run(std::int64_t count, std::vector<BlockMove>& moves, Tier tier) {
  const bool device = tier == Tier::kDevice;
  const std::int64_t begin = device ? 0 : num_blocks_, last = device ? num_blocks_ : num_blocks_ + num_host_blocks_;
  if (count <= 0 || count > (device ? num_free() : num_free_host())) return {};
  std::int64_t in_use = 0, in_runs = 0, first = -1, least = count;
  for (std::int64_t i = begin; i < last; ++i) {
    const auto add = [&](std::int64_t at, std::int64_t sign) {
      const Page& page = pages_[static_cast<std::size_t>(at)];
      in_use += page.references > 0 ? sign : 0;
      in_runs += page.in_run ? sign : 0;
    };
    add(i, 1);
    if (i - begin >= count) add(i - count, -1);
    if (i - begin + 1 < count || in_runs > 0 || in_use > least) continue;
    first = i + 1 - count;
    least = in_use;
  }
  if (first < 0) return {};
  const BlockRun run{static_cast<std::int32_t>(first), count};
  const auto end = static_cast<std::int32_t>(first + count);
  std::erase_if(blank(tier), [&](std::int32_t page) { return page >= run.first && page < end; });
  std::make_heap(blank(tier).begin(), blank(tier).end(), std::greater<>());
  for (std::int32_t i = run.first; i < end; ++i) {
    const Page& page = pages_[static_cast<std::size_t>(i)];
    if (page.references > 0 || !page.cached) continue;
    unlink(i);
    uncache(i);
  }
  for (std::int32_t i = run.first; i < end; ++i) {
    Page& page = pages_[static_cast<std::size_t>(i)];
    if (page.references > 0) {
      const std::int32_t to = allocate(tier);
      move(i, to);
      moves.push_back({i, to});
    }
    page = {.references = 1, .in_run = true};
  }
  return run;
}

void BlockManager::release_run(BlockRun& run) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const auto index = static_cast<std::int32_t>(run.first + i);
    Page& page = checked(index);
    require<Error>(page.in_run, "BlockManager.release_run: page ", index, " is in no run");
    page.in_run = false;
    page.references = 0;
    push_free(index);
  }
  run = {};
}

bool BlockManager::swap_out(std::vector<std::int32_t>& block_table, BlockRun& run,
                            std::vector<std::int32_t>& host_table, std::vector<BlockMove>& moves) {
  if (static_cast<std::int64_t>(block_table.size()) + run.count > num_free_host()) return false;
  const auto send = [&](std::int32_t page) {
    require<Error>(checked(page).references == 1 && !checked(page).cached, "BlockManager.swap_out: page ", page,
                   " has ", checked(page).references, " holders, wanted one that nobody can find");
    host_table.push_back(allocate(Tier::kHost));
    moves.push_back({page, host_table.back()});
  };
  for (const std::int32_t page : block_table) send(page);
  for (std::int64_t i = 0; i < run.count; ++i) send(static_cast<std::int32_t>(run.first + i));
  release(block_table);
  release_run(run);
  return true;
}

void BlockManager::swap_in(std::vector<std::int32_t>& host_table, std::span<const std::int32_t> block_table,
                           const BlockRun& run, std::vector<BlockMove>& moves) {
  require<Error>(host_table.size() == block_table.size() + static_cast<std::size_t>(run.count),
                 "BlockManager.swap_in: ", host_table.size(), " host pages for ", block_table.size(),
                 " pages and a run of ", run.count);
  for (std::size_t i = 0; i < host_table.size(); ++i)
    moves.push_back({host_table[i], i < block_table.size()
                                        ? block_table[i]
                                        : run.first + static_cast<std::int32_t>(i - block_table.size())});
  release(host_table);
}

void BlockManager::move(std::int32_t from, std::int32_t to) {
  Page &source = pages_[static_cast<std::size_t>(from)], &target = pages_[static_cast<std::size_t>(to)];
  target = source;
  if (!source.cached) return;
  std::int32_t* link = &buckets_[source.bucket];
  while (*link != from) link = &pages_[static_cast<std::size_t>(*link)].bucket_next;
  *link = to;
  std::copy_n(contents_.begin() + from * block_size_, block_size_, contents_.begin() + to * block_size_);
}

std::int64_t BlockManager::match_prefix(std::uint64_t cache_key, std::span<const std::int32_t> tokens,
                                        std::vector<std::int32_t>& block_table) {
  require<Error>(block_table.empty(), "BlockManager.match_prefix: block_table has ", block_table.size(),
                 " pages, wanted an empty one");
  if (!caching_ || tokens.empty()) return 0;
  const std::int64_t last = (static_cast<std::int64_t>(tokens.size()) - 1) / block_size_;
  std::uint64_t parent = 0;
  for (std::int64_t i = 0; i < last; ++i) {
    const std::int32_t found = lookup(cache_key, parent, tokens.data() + i * block_size_);
    if (found < 0) break;
    Page& page = pages_[static_cast<std::size_t>(found)];
    if (page.references++ == 0) unlink(found);
    block_table.push_back(found);
    parent = page.serial;
  }
  const std::int64_t hits = static_cast<std::int64_t>(block_table.size()) * block_size_;
  prefix_queries_ += static_cast<std::int64_t>(tokens.size());
  prefix_hits_ += hits;
  return hits;
}

BlockManager::Prefix BlockManager::find_prefix(std::uint64_t cache_key, std::span<const std::int32_t> tokens) const {
  Prefix prefix;
  if (!caching_ || tokens.empty()) return prefix;
  const std::int64_t last = (static_cast<std::int64_t>(tokens.size()) - 1) / block_size_;
  std::uint64_t parent = 0;
  for (std::int64_t i = 0; i < last; ++i) {
    const std::int32_t found = lookup(cache_key, parent, tokens.data() + i * block_size_);
    if (found < 0) break;
    const Page& page = pages_[static_cast<std::size_t>(found)];
    prefix.num_tokens += block_size_;
    if (page.references > 0) ++prefix.blocks_in_use;
    parent = page.serial;
  }
  return prefix;
}

void BlockManager::register_blocks(std::uint64_t cache_key, std::span<const std::int32_t> tokens,
                                   std::int64_t num_computed, std::span<const std::int32_t> block_table) {
  if (!caching_) return;
  const std::int64_t full = num_computed / block_size_;
  require<Error>(full <= static_cast<std::int64_t>(block_table.size()) &&
                     full * block_size_ <= static_cast<std::int64_t>(tokens.size()),
                 "BlockManager.register_blocks: num_computed is ", num_computed, ", but there are ", tokens.size(),
                 " tokens and ", block_table.size(), " pages");
  std::int64_t first = full;
  while (first > 0 && checked(block_table[static_cast<std::size_t>(first - 1)]).serial == 0) --first;
  for (std::int64_t i = first; i < full; ++i) {
    const auto index = static_cast<std::size_t>(i);
    const std::int32_t* content = tokens.data() + i * block_size_;
    const std::uint64_t parent = i == 0 ? 0 : checked(block_table[index - 1]).serial;
    Page& page = checked(block_table[index]);
    page.key = cache_key;
    page.parent = parent;
    if (const std::int32_t twin = lookup(cache_key, parent, content); twin >= 0) {
      page.serial = pages_[static_cast<std::size_t>(twin)].serial;  // the first copy stays the findable one
      continue;
    }
    page.serial = next_serial_++;
    page.cached = true;
    page.bucket = bucket_of(cache_key, parent, content);
    page.bucket_next = buckets_[page.bucket];
    buckets_[page.bucket] = block_table[index];
    std::copy_n(content, block_size_, contents_.begin() + block_table[index] * block_size_);
  }
}

void BlockManager::forget(std::uint64_t cache_key) {
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    Page& page = pages_[i];
    if (page.serial == 0 || page.key != cache_key) continue;
    const auto index = static_cast<std::int32_t>(i);
    const bool listed = page.cached && page.references == 0;
    if (listed) unlink(index);
    uncache(index);
    if (listed) push_free(index);
  }
}

std::int32_t BlockManager::allocate(Tier tier) {
  std::int32_t index;
  if (auto& free = blank(tier); !free.empty()) {
    std::pop_heap(free.begin(), free.end(), std::greater<>());
    index = free.back();
    free.pop_back();
  } else {
    index = lru_first_;
    unlink(index);
    uncache(index);
  }
  pages_[static_cast<std::size_t>(index)].references = 1;
  return index;
}

std::size_t BlockManager::bucket_of(std::uint64_t key, std::uint64_t parent, const std::int32_t* tokens) const {
  std::uint64_t h = key * 0x9e3779b97f4a7c15u + parent;
  for (std::int64_t i = 0; i < block_size_; ++i) {
    h = (h ^ static_cast<std::uint32_t>(tokens[i])) * 0xd6e8feb86659fd93u;
    h ^= h >> 32;
  }
  return static_cast<std::size_t>(h) & (buckets_.size() - 1);
}

std::int32_t BlockManager::lookup(std::uint64_t key, std::uint64_t parent, const std::int32_t* tokens) const {
  for (std::int32_t i = buckets_[bucket_of(key, parent, tokens)]; i >= 0;) {
    const Page& page = pages_[static_cast<std::size_t>(i)];
    if (page.parent == parent && page.key == key &&
        std::equal(tokens, tokens + block_size_, contents_.begin() + i * block_size_))
      return i;
    i = page.bucket_next;
  }
  return -1;
}

void BlockManager::uncache(std::int32_t index) {
  Page& page = pages_[static_cast<std::size_t>(index)];
  page.serial = 0;
  if (!page.cached) return;
  std::int32_t* link = &buckets_[page.bucket];
  while (*link != index) link = &pages_[static_cast<std::size_t>(*link)].bucket_next;
  *link = page.bucket_next;
  page.bucket_next = -1;
  page.cached = false;
}

void BlockManager::push_free(std::int32_t index) {
  Page& page = pages_[static_cast<std::size_t>(index)];
  if (!page.cached) {
    page.serial = 0;
    auto& free = blank(tier_of(index));
    free.push_back(index);
    std::push_heap(free.begin(), free.end(), std::greater<>());
    return;
  }
  page.previous = lru_last_;
  page.next = -1;
  (lru_last_ < 0 ? lru_first_ : pages_[static_cast<std::size_t>(lru_last_)].next) = index;
  lru_last_ = index;
  ++lru_size_;
}

void BlockManager::unlink(std::int32_t index) {
  Page& page = pages_[static_cast<std::size_t>(index)];
  (page.previous < 0 ? lru_first_ : pages_[static_cast<std::size_t>(page.previous)].next) = page.next;
  (page.next < 0 ? lru_last_ : pages_[static_cast<std::size_t>(page.next)].previous) = page.previous;
  page.previous = page.next = -1;
  --lru_size_;
}

BlockManager::Page& BlockManager::checked(std::int32_t index) {
  require<Error>(index >= 0 && index < static_cast<std::int32_t>(pages_.size()), "BlockManager: page ", index,
                 " is not one of ", pages_.size());
  return pages_[static_cast<std::size_t>(index)];
}

}  // namespace flexcore
