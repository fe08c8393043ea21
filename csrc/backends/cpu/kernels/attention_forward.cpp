#include "backends/cpu/kernels/attention_entries.h"
#include "backends/cpu/kernels/attention_panels.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

using namespace attention;  // NOLINT: this file is the building blocks' user

// Rows whose values are read from the pages, without a panel.
constexpr std::int64_t kFewRows = 6;

// Online softmax in base 2: scores arrive multiplied by log2(e).
struct State {
  float* o;    // [num_rows, padded]
  float* max;  // [num_rows]
  float* sum;  // [num_rows]
};

struct Scratch {
  float* q;       // [num_rows, padded]
  float* scores;  // [num_rows, kKeyBlock]
  State part, total;
  float* k_panel;  // [head_dim, kKeyBlock]
  float* v_panel;  // [kKeyBlock, padded]
};

std::int64_t align(std::int64_t floats) { return (floats + 15) / 16 * 16; }

State take_state(float*& scratch, std::int64_t rows, std::int64_t padded) {
  State state{scratch, scratch + align(rows * padded), scratch + align(rows * padded) + align(rows)};
  scratch = state.sum + align(rows);
  return state;
}

Scratch carve(const AttentionProblem& p, std::int64_t rows, float* scratch) {
  const std::int64_t padded = pad_dim(p.head_dim);
  Scratch s;
  s.q = scratch;
  s.scores = s.q + align(rows * padded);
  s.k_panel = s.scores + rows * kKeyBlock;
  s.v_panel = s.k_panel + p.head_dim * kKeyBlock;
  scratch = s.v_panel + kKeyBlock * padded;
  s.part = take_state(scratch, rows, padded);
  s.total = take_state(scratch, rows, padded);
  return s;
}

void reset(const State& state, std::int64_t rows, std::int64_t padded) {
  for (std::int64_t i = 0; i < rows * padded; ++i) state.o[i] = 0.0f;
  for (std::int64_t i = 0; i < rows; ++i) {
    state.max[i] = -__builtin_inff();
    state.sum[i] = 0.0f;
  }
}

// Turns a row's scores into probabilities relative to its new maximum, and rescales what it has.
FLEXCORE_INLINE void softmax_row(float* scores, Visible seen, float& max, float& sum, float* o, std::int64_t padded) {
  if (seen.begin > 0 || seen.end < kKeyBlock) mask_scores(scores, seen);
  Vec s[kBlockVecs], top = load(scores);
#pragma GCC unroll 16
  for (int v = 0; v < kBlockVecs; ++v) {
    s[v] = load(scores + v * kLanes);
    top = larger(s[v], top);
  }
  const float block_max = max_lanes(top);
  const float new_max = block_max > max ? block_max : max;
  // A row that sees nothing yet has no finite maximum; its probabilities are zeros all the same.
  const float base = new_max == -__builtin_inff() ? 0.0f : new_max;
  Vec row_sum{};
#pragma GCC unroll 16
  for (int v = 0; v < kBlockVecs; ++v) {
    s[v] = vec::exp2_bounded(s[v] - base);
    store(scores + v * kLanes, s[v]);
    row_sum += s[v];
  }
  const float factor = new_max > max ? vec::exp2_bounded(max - base) : 1.0f;
  if (factor != 1.0f) {
    for (std::int64_t d = 0; d < padded; d += kLanes) store(o + d, factor * load(o + d));
  }
  sum = factor * sum + sum_lanes(row_sum);
  max = new_max;
}

// The rows' attention over keys [first, last) of one split.
__attribute__((noinline, noclone)) void attend(const AttentionProblem& p, const AttentionTile& t, const Scratch& s,
                                               std::int64_t split) {
  const std::int64_t padded = pad_dim(p.head_dim), end = t.position + t.num_tokens;
  const std::int64_t stop = least((split + 1) * kKeySplit, end);
  reset(s.part, t.num_tokens * p.group, padded);
  for (std::int64_t first = split * kKeySplit; first < stop; first += kKeyBlock) {
    const Visible tokens = seeing_tokens(p, t, first, first + kKeyBlock);
    if (tokens.begin >= tokens.end) continue;
    BlockKeys keys;
    find_keys(p, t, first, end, keys);
    prefetch_keys(p, t, first + kKeyBlock, stop);
    gather_columns(p.keys, p.bf16_pages, keys, p.head_dim, s.k_panel);
    const bool few = (tokens.end - tokens.begin) * p.group <= kFewRows && padded == p.head_dim;
    if (!few) gather_rows(p.values, p.bf16_pages, keys, p.head_dim, s.v_panel);
    for (std::int64_t token = tokens.begin, next; token < tokens.end; token = next) {
      next = strip_end(t, first, token, tokens.end);
      const std::int64_t row = token * p.group, rows = (next - token) * p.group;
      const std::int64_t num_keys = least(kKeyBlock, t.position + next - first);
      float *scores = s.scores + row * kKeyBlock, *o = s.part.o + row * padded;
      tile_product<false>({s.q + row * padded, padded, 1, s.k_panel, kKeyBlock, scores, kKeyBlock, p.head_dim}, rows,
                          pad_dim(num_keys));
      for (std::int64_t i = token; i < next; ++i) {
        const Visible seen = visible_keys(p, t.position + i, first);
        for (std::int64_t r = i * p.group; r < (i + 1) * p.group; ++r)
          softmax_row(s.scores + r * kKeyBlock, seen, s.part.max[r], s.part.sum[r], s.part.o + r * padded, padded);
      }
      if (few)
        (p.bf16_pages ? page_product<true> : page_product<false>)(p.values, keys, num_keys, scores, rows, padded, o);
      else
        tile_product<true>({scores, kKeyBlock, 1, s.v_panel, padded, o, padded, num_keys}, rows, padded);
    }
  }
}

// One function for both ways of working, so that its arithmetic is one.
__attribute__((noinline, noclone)) void merge(const State& total, const float* o, const float* max, const float* sum,
                                              std::int64_t rows, std::int64_t padded) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (max[r] == -__builtin_inff() && sum[r] == 0.0f) continue;
    const float top = max[r] > total.max[r] ? max[r] : total.max[r];
    const float a = vec::exp2_bounded(total.max[r] - top), b = vec::exp2_bounded(max[r] - top);
    for (std::int64_t d = 0; d < padded; d += kLanes)
      store(total.o + r * padded + d, a * load(total.o + r * padded + d) + b * load(o + r * padded + d));
    total.sum[r] = a * total.sum[r] + b * sum[r];
    total.max[r] = top;
  }
}

__attribute__((noinline, noclone)) void write_result(const AttentionProblem& p, const AttentionTile& t,
                                                     const State& total) {
  const std::int64_t padded = pad_dim(p.head_dim);
  for (std::int64_t token = 0; token < t.num_tokens; ++token) {
    for (std::int64_t g = 0; g < p.group; ++g) {
      const std::int64_t r = token * p.group + g, head = t.kv_head * p.group + g;
      store_row(total.o + r * padded, p.head_dim, 1.0f / total.sum[r], head_row(p.y, t.token + token, head), p.y.bf16);
      if (p.lse != nullptr)
        p.lse[(t.token + token) * p.lse_stride + head] = total.max[r] * kLn2 + vec::log(total.sum[r]);
    }
  }
}

void load_queries(const AttentionProblem& p, const AttentionTile& t, float* q) {
  const std::int64_t padded = pad_dim(p.head_dim);
  for (std::int64_t token = 0; token < t.num_tokens; ++token) {
    for (std::int64_t g = 0; g < p.group; ++g)
      load_row(head_row(p.q, t.token + token, t.kv_head * p.group + g), p.q.bf16, p.head_dim, p.scale * kLog2E,
               q + (token * p.group + g) * padded);
  }
}

}  // namespace

std::int64_t attention_forward_scratch(const AttentionProblem& p, std::int64_t rows) {
  const std::int64_t padded = pad_dim(p.head_dim);
  return 3 * align(rows * padded) + rows * kKeyBlock + (p.head_dim + padded) * kKeyBlock + 4 * align(rows);
}

void attention_forward(const AttentionProblem& p, const AttentionTile& t, float* scratch) {
  const std::int64_t rows = t.num_tokens * p.group, padded = pad_dim(p.head_dim);
  const Scratch s = carve(p, rows, scratch);
  load_queries(p, t, s.q);
  reset(s.total, rows, padded);
  const std::int64_t oldest = p.sliding_window > 0 ? most(t.position - p.sliding_window + 1, 0) : 0;
  for (std::int64_t split = oldest / kKeySplit; split * kKeySplit < t.position + t.num_tokens; ++split) {
    attend(p, t, s, split);
    merge(s.total, s.part.o, s.part.max, s.part.sum, rows, padded);
  }
  write_result(p, t, s.total);
}

void attention_forward_split(const AttentionProblem& p, const AttentionTile& t, std::int64_t split, float* partial,
                             float* scratch) {
  const std::int64_t rows = t.num_tokens * p.group, padded = pad_dim(p.head_dim);
  Scratch s = carve(p, rows, scratch);
  s.part = {partial, partial + rows * padded, partial + rows * padded + rows};
  load_queries(p, t, s.q);
  attend(p, t, s, split);
}

void attention_forward_merge(const AttentionProblem& p, const AttentionTile& t, std::int64_t num_splits,
                             const float* partials, float* scratch) {
  const std::int64_t rows = t.num_tokens * p.group, padded = pad_dim(p.head_dim);
  const Scratch s = carve(p, rows, scratch);
  reset(s.total, rows, padded);
  for (std::int64_t i = 0; i < num_splits; ++i, partials += rows * (padded + 2))
    merge(s.total, partials, partials + rows * padded, partials + rows * padded + rows, rows, padded);
  write_result(p, t, s.total);
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
