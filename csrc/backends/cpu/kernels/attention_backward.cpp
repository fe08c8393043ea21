#include "backends/cpu/kernels/attention_entries.h"
#include "backends/cpu/kernels/attention_panels.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

using namespace attention;  // NOLINT: this file is the building blocks' user

// Keys and rows in work at a time: with head_dim 64, their panels and accumulators (320 KiB) and a row tile (100 KiB)
// stay in a 512 KiB cache.
std::int64_t chunk_keys(std::int64_t head_dim) { return head_dim <= 64 ? 256 : head_dim <= 128 ? 128 : 64; }
std::int64_t tile_tokens(const AttentionProblem& p) { return most((p.head_dim <= 64 ? 96 : 48) / p.group, 1); }

std::int64_t align(std::int64_t floats) { return (floats + 15) / 16 * 16; }

struct Scratch {
  float *k_columns, *v_columns;  // [chunk / kKeyBlock][head_dim, kKeyBlock]
  float* k_rows;                 // [chunk, padded]
  float *grad_k, *grad_v;        // [chunk, padded]
  float *q, *grad_y;             // [rows, padded]
  float *prob, *grad_score;      // [rows, kKeyBlock]
  float *lse, *delta;            // [rows]
};

// Carves the scratch, or measures it when `base` is null.
std::int64_t carve(const AttentionProblem& p, float* base, Scratch& s) {
  const std::int64_t chunk = chunk_keys(p.head_dim), padded = pad_dim(p.head_dim), rows = tile_tokens(p) * p.group;
  std::int64_t used = 0;
  const auto take = [&](std::int64_t floats) {
    float* block = base == nullptr ? nullptr : base + used;
    used += align(floats);
    return block;
  };
  s.k_columns = take(chunk * p.head_dim);
  s.v_columns = take(chunk * p.head_dim);
  s.k_rows = take(chunk * padded);
  s.grad_k = take(chunk * padded);
  s.grad_v = take(chunk * padded);
  s.q = take(rows * padded);
  s.grad_y = take(rows * padded);
  s.prob = take(rows * kKeyBlock);
  s.grad_score = take(rows * kKeyBlock);
  s.lse = take(rows);
  s.delta = take(rows);
  return used;
}

// Reads tokens [begin, end) of the window: q and lse in base 2, grad_y, and delta = rowsum(grad_y * y).
void load_tile(const AttentionProblem& p, const HeadRows& grad_y, const AttentionTile& t, std::int64_t begin,
               std::int64_t end, const Scratch& s) {
  const std::int64_t padded = pad_dim(p.head_dim);
  for (std::int64_t token = begin; token < end; ++token) {
    for (std::int64_t g = 0; g < p.group; ++g) {
      const std::int64_t row = (token - begin) * p.group + g, in = t.token + token, head = t.kv_head * p.group + g;
      float y[256 + kLanes];
      load_row(head_row(p.y, in, head), p.y.bf16, p.head_dim, 1.0f, y);
      load_row(head_row(grad_y, in, head), grad_y.bf16, p.head_dim, 1.0f, s.grad_y + row * padded);
      load_row(head_row(p.q, in, head), p.q.bf16, p.head_dim, p.scale * kLog2E, s.q + row * padded);
      Vec delta{};
      for (std::int64_t d = 0; d < padded; d += kLanes) delta += load(y + d) * load(s.grad_y + row * padded + d);
      s.delta[row] = sum_lanes(delta);
      s.lse[row] = p.lse[in * p.lse_stride + head] * kLog2E;
    }
  }
}

// Scores become P = exp(S - lse), and dP becomes dS = P * (dP - delta).
FLEXCORE_INLINE void softmax_backward_row(float* prob, float* grad_score, Visible seen, float lse, float delta) {
  if (seen.begin > 0 || seen.end < kKeyBlock) mask_scores(prob, seen);
#pragma GCC unroll 16
  for (int v = 0; v < kBlockVecs; ++v) {
    // Not bounded by 1: lse may be of another forward than this one.
    const Vec x = vec::exp2(load(prob + v * kLanes) - lse);
    store(prob + v * kLanes, x);
    store(grad_score + v * kLanes, x * (load(grad_score + v * kLanes) - delta));
  }
}

struct Chunk {
  std::int64_t begin, end;  // key positions
};

// All gradients of tokens [begin, end) against the chunk's keys.
void attend_backward(const AttentionProblem& p, const AttentionBackwardPiece& piece, Chunk chunk, std::int64_t begin,
                     std::int64_t end, const Scratch& s) {
  const std::int64_t padded = pad_dim(p.head_dim), group = p.group;
  const AttentionTile& t = piece.tile;
  for (std::int64_t first = chunk.begin; first < chunk.end; first += kKeyBlock) {
    const Visible seeing = seeing_tokens(p, t, first, first + kKeyBlock);
    const Visible tokens{most(begin, seeing.begin), least(end, seeing.end)};
    if (tokens.begin >= tokens.end) continue;
    const std::int64_t offset = first - chunk.begin;
    const float *k_columns = s.k_columns + offset * p.head_dim, *v_columns = s.v_columns + offset * p.head_dim;
    for (std::int64_t token = tokens.begin, next; token < tokens.end; token = next) {
      next = strip_end(t, first, token, tokens.end);
      const std::int64_t row = (token - begin) * group, rows = (next - token) * group;
      const std::int64_t keys = least(least(kKeyBlock, chunk.end - first), t.position + next - first);
      const float *q = s.q + row * padded, *grad_y = s.grad_y + row * padded;
      float *prob = s.prob + row * kKeyBlock, *grad_score = s.grad_score + row * kKeyBlock;
      tile_product<false>({q, padded, 1, k_columns, kKeyBlock, prob, kKeyBlock, p.head_dim}, rows, pad_dim(keys));
      tile_product<false>({grad_y, padded, 1, v_columns, kKeyBlock, grad_score, kKeyBlock, p.head_dim}, rows,
                          pad_dim(keys));
      for (std::int64_t i = token; i < next; ++i) {
        const Visible seen = visible_keys(p, t.position + i, first);
        for (std::int64_t r = (i - begin) * group; r < (i - begin + 1) * group; ++r)
          softmax_backward_row(s.prob + r * kKeyBlock, s.grad_score + r * kKeyBlock, seen, s.lse[r], s.delta[r]);
      }
      tile_product<true>({prob, 1, kKeyBlock, grad_y, padded, s.grad_v + offset * padded, padded, rows}, keys, padded);
      tile_product<true>({grad_score, 1, kKeyBlock, q, padded, s.grad_k + offset * padded, padded, rows}, keys, padded);
      tile_product<true>({grad_score, kKeyBlock, 1, s.k_rows + offset * padded, padded,
                          piece.grad_q + token * group * padded, padded, keys},
                         rows, padded);
    }
  }
}

// Adds the chunk's sums to the accumulators; rows of the window's own tokens are final, and are copied out.
void add_chunk(const AttentionProblem& p, const AttentionGradients& g, const AttentionBackwardPiece& piece, Chunk chunk,
               const Scratch& s) {
  const std::int64_t padded = pad_dim(p.head_dim);
  const AttentionTile& t = piece.tile;
  for (std::int64_t key = chunk.begin; key < chunk.end; ++key) {
    const std::int64_t at = (key * p.num_kv_heads + t.kv_head) * p.head_dim, from = (key - chunk.begin) * padded;
    for (std::int64_t d = 0; d < p.head_dim; ++d) {
      piece.grad_k[at + d] += kLn2 * s.grad_k[from + d];
      piece.grad_v[at + d] += s.grad_v[from + d];
    }
    if (key < t.position) continue;
    const std::int64_t token = t.token + key - t.position;
    store_row(piece.grad_k + at, p.head_dim, 1.0f, head_row(g.grad_k_rows, token, t.kv_head), g.grad_k_rows.bf16);
    store_row(piece.grad_v + at, p.head_dim, 1.0f, head_row(g.grad_v_rows, token, t.kv_head), g.grad_v_rows.bf16);
  }
}

}  // namespace

std::int64_t attention_backward_scratch(const AttentionProblem& p) {
  Scratch s;
  return carve(p, nullptr, s);
}

void attention_backward(const AttentionProblem& p, const AttentionGradients& g, const AttentionBackwardPiece& piece,
                        float* scratch) {
  Scratch s;
  carve(p, scratch, s);
  const std::int64_t padded = pad_dim(p.head_dim), step = tile_tokens(p);
  const AttentionTile& t = piece.tile;
  const Visible all = seeing_tokens(p, t, piece.key_begin, piece.key_end);
  for (std::int64_t i = all.begin * p.group * padded; i < all.end * p.group * padded; ++i) piece.grad_q[i] = 0.0f;
  for (Chunk chunk{piece.key_begin, 0}; chunk.begin < piece.key_end; chunk.begin = chunk.end) {
    chunk.end = least(chunk.begin + chunk_keys(p.head_dim), piece.key_end);
    for (std::int64_t first = chunk.begin; first < chunk.end; first += kKeyBlock) {
      BlockKeys keys;
      find_keys(p, t, first, chunk.end, keys);
      const std::int64_t offset = first - chunk.begin;
      gather_columns(p.keys, p.bf16_pages, keys, p.head_dim, s.k_columns + offset * p.head_dim);
      gather_columns(p.values, p.bf16_pages, keys, p.head_dim, s.v_columns + offset * p.head_dim);
      gather_rows(p.keys, p.bf16_pages, keys, p.head_dim, s.k_rows + offset * padded);
    }
    for (std::int64_t i = 0; i < (chunk.end - chunk.begin) * padded; ++i) s.grad_k[i] = s.grad_v[i] = 0.0f;
    const Visible tokens = seeing_tokens(p, t, chunk.begin, chunk.end);
    for (std::int64_t begin = tokens.begin; begin < tokens.end; begin += step) {
      const std::int64_t end = least(begin + step, tokens.end);
      load_tile(p, g.grad_y, t, begin, end, s);
      attend_backward(p, piece, chunk, begin, end, s);
    }
    add_chunk(p, g, piece, chunk, s);
  }
}

void attention_backward_reduce(const AttentionProblem& p, const AttentionGradients& g,
                               const AttentionBackwardPiece* pieces, std::int64_t num_pieces, std::int64_t begin,
                               std::int64_t end) {
  const std::int64_t padded = pad_dim(p.head_dim);
  const AttentionTile& t = pieces[0].tile;
  float sum[256 + kLanes];
  for (std::int64_t token = begin; token < end; ++token) {
    for (std::int64_t h = 0; h < p.group; ++h) {
      for (std::int64_t d = 0; d < padded; ++d) sum[d] = 0.0f;
      for (std::int64_t i = 0; i < num_pieces; ++i) {
        const Visible seeing = seeing_tokens(p, t, pieces[i].key_begin, pieces[i].key_end);
        if (token < seeing.begin || token >= seeing.end) continue;
        const float* part = pieces[i].grad_q + (token * p.group + h) * padded;
        for (std::int64_t d = 0; d < padded; d += kLanes) store(sum + d, load(sum + d) + load(part + d));
      }
      store_row(sum, p.head_dim, p.scale, head_row(g.grad_q, t.token + token, t.kv_head * p.group + h), g.grad_q.bf16);
    }
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
