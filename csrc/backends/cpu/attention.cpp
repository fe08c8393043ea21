#include "ops/attention.h"

#include <algorithm>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/attention.h"
#include "backends/cpu/scratch.h"

namespace flexcore::cpu {

namespace {

// Multiply-adds below which waking the team costs more than it saves.
constexpr std::int64_t kSerialWork = 50'000;
constexpr std::size_t kMaxPartialBytes = std::size_t{64} << 20;

HeadRows head_rows(const TensorView& x) { return {x.data(), x.stride(0), x.stride(1), x.dtype() == DType::kBFloat16}; }

AttentionProblem make_problem(const KvPages& pages) {
  AttentionProblem p;
  p.keys = pages.keys.data();
  p.values = pages.values.data();
  p.bf16_pages = pages.keys.dtype() == DType::kBFloat16;
  p.num_kv_heads = pages.keys.shape(1);
  p.block_size = pages.keys.shape(2);
  p.head_dim = pages.keys.shape(3);
  p.page_stride = pages.keys.stride(0);
  return p;
}

template <class Args>
AttentionProblem make_problem(const Args& args) {
  AttentionProblem p = make_problem(args.pages);
  p.q = head_rows(args.q);
  p.group = args.q.shape(1) / p.num_kv_heads;
  p.sliding_window = args.sliding_window;
  p.scale = args.scale;
  p.y = head_rows(args.y);
  if (args.lse) {
    p.lse = args.lse.template as<float>();
    p.lse_stride = args.lse.stride(0);
  }
  return p;
}

AttentionTile make_tile(const AttentionSpan& span, std::int64_t begin, std::int64_t end, std::int64_t kv_head) {
  return {span.row_begin + begin, end - begin, span.position + begin, kv_head, span.block_table};
}

// The oldest position that a tile sees.
std::int64_t first_key(const AttentionProblem& p, const AttentionTile& t) {
  return p.sliding_window > 0 ? std::max<std::int64_t>(t.position - p.sliding_window + 1, 0) : 0;
}

// Multiply-adds of a tile against keys [begin, end), causal mask ignored but for its outline.
std::int64_t work(const AttentionProblem& p, const AttentionTile& t, std::int64_t begin, std::int64_t end) {
  const std::int64_t last = t.position + t.num_tokens;
  const std::int64_t full = std::max<std::int64_t>(std::min(end, t.position) - begin, 0);
  const std::int64_t part = std::max<std::int64_t>(std::min(end, last) - std::max(begin, t.position), 0);
  return (t.num_tokens * p.group + 1) * (full + part / 2 + 1) * 2 * p.head_dim;
}

// body(index, worker) over all items, dearest first where one of them could hold the others up.
template <class Item, class Body>
void run_items(ThreadPool& threads, Item* items, std::int64_t count, const Body& body) {
  std::int64_t total = 0, dearest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    total += items[i].work;
    dearest = std::max(dearest, items[i].work);
  }
  if (total < kSerialWork) {
    for (std::int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  if (dearest * count > total + total / 4)
    std::sort(items, items + count, [](const Item& a, const Item& b) { return a.work > b.work; });
  threads.parallel_for_each(count, body);
}

void kv_write(OpContext& context, const KvWriteArgs& args) {
  const AttentionProblem p = make_problem(args.pages);
  const AttentionKernels& kernels = attention_kernels();
  const HeadRows k = head_rows(args.k), v = head_rows(args.v);
  constexpr std::int64_t kGrain = 16;  // tokens
  for (const auto& span : args.spans) {
    context.threads->parallel_for(span.row_end - span.row_begin, kGrain,
                                  [&](std::int64_t begin, std::int64_t end, int) {
                                    kernels.write_pages(k, v, p, make_tile(span, begin, end, 0));
                                  });
  }
}

struct ForwardItem {
  AttentionTile tile;
  std::int64_t work;
  std::int64_t split;  // -1: all keys
  float* partial;
};

struct MergeItem {
  AttentionTile tile;
  std::int64_t work;
  std::int64_t num_splits;
  const float* partials;
};

// How the rows are cut. No cut changes a result, so they may follow the number of threads.
struct ForwardPlan {
  std::int64_t tile_tokens = 1;
  std::int64_t num_tiles = 0, num_splits = 0;  // over all kv heads; num_splits: 0 where keys stay whole
  std::int64_t partial_floats = 0;
};

template <class F>
void for_each_tile(const AttentionArgs& args, const AttentionProblem& p, std::int64_t tile_tokens, F&& f) {
  for (const auto& span : args.spans) {
    const std::int64_t tokens = span.row_end - span.row_begin;
    for (std::int64_t begin = 0; begin < tokens; begin += tile_tokens) {
      for (std::int64_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head)
        f(make_tile(span, begin, std::min(begin + tile_tokens, tokens), kv_head));
    }
  }
}

// Queries, scores and two outputs of a tile: about 200 KiB at head_dim 64. Each tile gathers its keys anew, 3 % of
// its work.
std::int64_t largest_tile(const AttentionProblem& p) {
  const std::int64_t most_rows = p.head_dim <= 64 ? 192 : p.head_dim <= 128 ? 96 : 48;
  return std::max<std::int64_t>(most_rows / p.group, 1);
}

// Below so many, keys are split too.
std::int64_t wanted_tiles(std::int64_t num_threads) { return num_threads == 1 ? 1 : 4 * num_threads; }

// Pieces of the keys for each of `num_windows` windows of the backward, at most.
std::int64_t wanted_pieces(std::int64_t num_windows, std::int64_t num_kv_heads) {
  return std::clamp<std::int64_t>(12 / (num_windows * num_kv_heads), 1, 8);
}

ForwardPlan plan_forward(const AttentionArgs& args, const AttentionProblem& p, int num_threads, std::int64_t padded) {
  const std::int64_t wanted = wanted_tiles(num_threads);
  ForwardPlan plan{.tile_tokens = largest_tile(p)};
  while (true) {
    plan.num_tiles = 0;
    for_each_tile(args, p, plan.tile_tokens, [&](const AttentionTile&) { ++plan.num_tiles; });
    if (plan.num_tiles >= wanted || plan.tile_tokens == 1 || plan.tile_tokens * p.group <= 48) break;
    plan.tile_tokens = (plan.tile_tokens + 1) / 2;
  }
  if (plan.num_tiles >= wanted) return plan;
  for_each_tile(args, p, plan.tile_tokens, [&](const AttentionTile& t) {
    const std::int64_t splits = (t.position + t.num_tokens - 1) / kKeySplit - first_key(p, t) / kKeySplit + 1;
    plan.num_splits += splits;
    plan.partial_floats += splits * t.num_tokens * p.group * (padded + 2);
  });
  if (plan.num_splits == plan.num_tiles || plan.partial_floats * sizeof(float) > kMaxPartialBytes) plan.num_splits = 0;
  return plan;
}

void attention(OpContext& context, const AttentionArgs& args) {
  const AttentionProblem p = make_problem(args);
  const AttentionKernels& kernels = attention_kernels();
  const std::int64_t padded = kernels.padded_dim(p.head_dim);
  const int num_threads = context.threads->size();
  const ForwardPlan plan = plan_forward(args, p, num_threads, padded);
  if (plan.num_tiles == 0) return;

  const Arena::Scope scope(*context.scratch);
  const std::int64_t scratch_floats = kernels.forward_scratch(p, plan.tile_tokens * p.group);
  float* scratch = context.scratch->allocate<float>(static_cast<std::size_t>(scratch_floats * num_threads));
  const bool split = plan.num_splits > 0;
  const std::int64_t count = split ? plan.num_splits : plan.num_tiles;
  auto* items = context.scratch->allocate<ForwardItem>(static_cast<std::size_t>(count));
  auto* merges = context.scratch->allocate<MergeItem>(static_cast<std::size_t>(split ? plan.num_tiles : 0));
  float* partial = context.scratch->allocate<float>(static_cast<std::size_t>(split ? plan.partial_floats : 0));
  std::int64_t num_items = 0, num_merges = 0;
  for_each_tile(args, p, plan.tile_tokens, [&](const AttentionTile& t) {
    const std::int64_t begin = first_key(p, t), end = t.position + t.num_tokens;
    if (!split) {
      items[num_items++] = {t, work(p, t, begin, end), -1, nullptr};
      return;
    }
    const std::int64_t first = begin / kKeySplit, last = (end - 1) / kKeySplit, rows = t.num_tokens * p.group;
    merges[num_merges++] = {t, rows * (last - first + 1) * padded, last - first + 1, partial};
    for (std::int64_t i = first; i <= last; ++i, partial += rows * (padded + 2))
      items[num_items++] = {t, work(p, t, i * kKeySplit, (i + 1) * kKeySplit), i, partial};
  });

  run_items(*context.threads, items, num_items, [&](std::int64_t i, int worker) {
    const ForwardItem& item = items[i];
    if (item.split < 0)
      kernels.forward(p, item.tile, scratch + worker * scratch_floats);
    else
      kernels.forward_split(p, item.tile, item.split, item.partial, scratch + worker * scratch_floats);
  });
  run_items(*context.threads, merges, num_merges, [&](std::int64_t i, int worker) {
    kernels.forward_merge(p, merges[i].tile, merges[i].num_splits, merges[i].partials,
                          scratch + worker * scratch_floats);
  });
}

struct BackwardItem {
  AttentionBackwardPiece piece;
  std::int64_t work;
};

struct ReduceItem {
  const AttentionBackwardPiece* pieces;
  std::int64_t num_pieces, begin, end, work;
};

// Keys [first, end) of a window in pieces of `length`. Depends on shapes alone, so that a result does not follow the
// number of threads.
struct KeyPieces {
  std::int64_t first, end, length;
  std::int64_t count() const { return (end - first + length - 1) / length; }
};

KeyPieces cut_keys(const AttentionProblem& p, const AttentionSpan& span, std::int64_t num_windows,
                   std::int64_t padded) {
  const std::int64_t tokens = span.row_end - span.row_begin;
  const std::int64_t first = first_key(p, make_tile(span, 0, tokens, 0)) / kKeyBlock * kKeyBlock;
  const std::int64_t end = span.position + tokens;
  // Enough pieces that a few heads of one sequence keep several cores busy; each has its own grad_q, which bounds their
  // number.
  const auto bytes = tokens * p.group * p.num_kv_heads * padded * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t room = static_cast<std::int64_t>(kMaxPartialBytes) / bytes;
  const std::int64_t count = std::clamp<std::int64_t>(room, 1, wanted_pieces(num_windows, p.num_kv_heads));
  const std::int64_t blocks = (end - first + kKeyBlock - 1) / kKeyBlock;
  return {first, end, (blocks + count - 1) / count * kKeyBlock};
}

void attention_backward(OpContext& context, const AttentionBackwardArgs& args) {
  const AttentionProblem p = make_problem(args);
  const AttentionKernels& kernels = attention_kernels();
  const std::int64_t padded = kernels.padded_dim(p.head_dim);
  const AttentionGradients gradients{head_rows(args.grad_y), head_rows(args.grad_q), head_rows(args.grad_k_rows),
                                     head_rows(args.grad_v_rows)};
  constexpr std::int64_t kReduceTokens = 64;
  std::int64_t num_windows = 0, num_pieces = 0, num_reduces = 0, grad_q_floats = 0;
  for (const auto& window : args.spans) num_windows += window.span.row_end > window.span.row_begin;
  if (num_windows == 0) return;
  for (const auto& window : args.spans) {
    const std::int64_t tokens = window.span.row_end - window.span.row_begin;
    if (tokens == 0) continue;
    const std::int64_t pieces = cut_keys(p, window.span, num_windows, padded).count() * p.num_kv_heads;
    num_pieces += pieces;
    num_reduces += (tokens + kReduceTokens - 1) / kReduceTokens * p.num_kv_heads;
    grad_q_floats += pieces * tokens * p.group * padded;
  }

  Arena& arena = *context.scratch;
  const Arena::Scope scope(arena);
  const std::int64_t scratch_floats = kernels.backward_scratch(p);
  float* scratch = arena.allocate<float>(static_cast<std::size_t>(scratch_floats * context.threads->size()));
  float* grad_q = arena.allocate<float>(static_cast<std::size_t>(grad_q_floats));
  auto* pieces = arena.allocate<AttentionBackwardPiece>(static_cast<std::size_t>(num_pieces));
  auto* items = arena.allocate<BackwardItem>(static_cast<std::size_t>(num_pieces));
  auto* reduces = arena.allocate<ReduceItem>(static_cast<std::size_t>(num_reduces));
  std::int64_t piece = 0, reduce = 0;
  for (const auto& window : args.spans) {
    const std::int64_t tokens = window.span.row_end - window.span.row_begin;
    if (tokens == 0) continue;
    const KeyPieces cut = cut_keys(p, window.span, num_windows, padded);
    for (std::int64_t kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
      const AttentionTile tile = make_tile(window.span, 0, tokens, kv_head);
      for (std::int64_t begin = 0; begin < tokens; begin += kReduceTokens) {
        const std::int64_t end = std::min(begin + kReduceTokens, tokens);
        reduces[reduce++] = {pieces + piece, cut.count(), begin, end, (end - begin) * p.group * padded * cut.count()};
      }
      for (std::int64_t begin = cut.first; begin < cut.end; begin += cut.length, ++piece) {
        const std::int64_t end = std::min(begin + cut.length, cut.end);
        pieces[piece] = {tile, begin, end, window.grad_k, window.grad_v, grad_q};
        items[piece] = {pieces[piece], work(p, tile, begin, end) * 5 / 2};
        grad_q += tokens * p.group * padded;
      }
    }
  }

  run_items(*context.threads, items, num_pieces, [&](std::int64_t i, int worker) {
    kernels.backward(p, gradients, items[i].piece, scratch + worker * scratch_floats);
  });
  run_items(*context.threads, reduces, num_reduces, [&](std::int64_t i, int) {
    const ReduceItem& r = reduces[i];
    kernels.backward_reduce(p, gradients, r.pieces, r.num_pieces, r.begin, r.end);
  });
}

}  // namespace

std::int64_t attention_scratch(const ScratchShape& s) {
  AttentionProblem p;
  p.group = s.num_heads / s.num_kv_heads;
  p.num_kv_heads = s.num_kv_heads;
  p.head_dim = s.head_dim;
  const AttentionKernels& kernels = attention_kernels();
  const std::int64_t padded = kernels.padded_dim(p.head_dim), most_partial = kMaxPartialBytes;
  constexpr std::int64_t kPadding = 256;

  const std::int64_t tile_rows = largest_tile(p) * p.group, splits = s.positions / kKeySplit + 2;
  const std::int64_t tiles = s.rows * s.num_kv_heads, split_tiles = std::min(tiles, wanted_tiles(s.num_threads));
  const std::int64_t partial = std::min(split_tiles * splits * tile_rows * (padded + 2) * 4, most_partial);
  const std::int64_t forward = s.num_threads * kernels.forward_scratch(p, tile_rows) * 4 + partial +
                               std::max<std::int64_t>(tiles * sizeof(ForwardItem),
                                                      split_tiles * (splits * sizeof(ForwardItem) + sizeof(MergeItem)));

  const std::int64_t grad_q = s.rows * s.num_heads * padded * 4;
  const std::int64_t most_pieces = (8 + s.rows) * s.num_kv_heads;
  const std::int64_t backward =
      s.num_threads * kernels.backward_scratch(p) * 4 +
      std::max(grad_q, std::min(grad_q * wanted_pieces(1, s.num_kv_heads), most_partial)) +
      most_pieces * (sizeof(AttentionBackwardPiece) + sizeof(BackwardItem) + sizeof(ReduceItem));
  return std::max(forward, backward) + kPadding * 4;
}

void register_attention(OpRegistry& registry) {
  registry.add<KvWriteArgs>(DeviceKind::kCpu, kv_write);
  registry.add<AttentionArgs>(DeviceKind::kCpu, attention);
  registry.add<AttentionBackwardArgs>(DeviceKind::kCpu, attention_backward);
}

}  // namespace flexcore::cpu
