#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "op_fixture.h"
#include "ops/attention.h"

namespace flexcore::test {

struct AttentionShape {
  std::int64_t num_heads = 4, num_kv_heads = 2, head_dim = 16, block_size = 16, sliding_window = 0;
  DType rows = DType::kFloat32, pages = DType::kFloat32;  // of q, k, v, y and gradients; of the pages
  std::int64_t last_rows = 0;                             // that have results; 0: all
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(head_dim)); }
};

inline TensorView head_view(Matrix& m, std::int64_t heads, std::int64_t gap = 0) {
  TensorView v(m.view().data(), m.dtype(), {m.rows(), heads, m.width() / heads});
  v.set_stride(0, m.width() + gap);
  return v;
}

/// A sequence and, in double, everything that attention makes of it.
struct Sequence {
  Sequence(const AttentionShape& shape, std::int64_t length, std::mt19937& rng)
      : shape(shape),
        length(length),
        q(Matrix::random(shape.rows, length, shape.num_heads * shape.head_dim, rng)),
        k(Matrix::random(shape.pages, length, shape.num_kv_heads * shape.head_dim, rng)),
        v(Matrix::random(shape.pages, length, shape.num_kv_heads * shape.head_dim, rng)),
        grad_y(Matrix::random(shape.rows, length, shape.num_heads * shape.head_dim, rng)) {
    const auto q_size = static_cast<std::size_t>(length * q.width()),
               k_size = static_cast<std::size_t>(length * k.width());
    y.resize(q_size), grad_q.resize(q_size), grad_k.resize(k_size), grad_v.resize(k_size);
    lse.resize(static_cast<std::size_t>(length * shape.num_heads));
    for (std::int64_t i = shape.last_rows > 0 ? length - shape.last_rows : 0; i < length; ++i)
      for (std::int64_t h = 0; h < shape.num_heads; ++h) attend(i, h);
  }

  AttentionShape shape;
  std::int64_t length;
  Matrix q, k, v, grad_y;
  std::vector<double> y, lse, grad_q, grad_k, grad_v;

 private:
  void attend(std::int64_t i, std::int64_t h) {
    const std::int64_t dim = shape.head_dim, a = h * dim, b = h / (shape.num_heads / shape.num_kv_heads) * dim;
    const std::int64_t first = shape.sliding_window > 0 ? std::max<std::int64_t>(i - shape.sliding_window + 1, 0) : 0;
    std::vector<double> p(static_cast<std::size_t>(i + 1));
    double total = 0, delta = 0;
    for (std::int64_t j = first; j <= i; ++j) {
      for (std::int64_t d = 0; d < dim; ++d) p[j] += q(i, a + d) * k(j, b + d) * shape.scale();
      total += p[j] = std::exp(p[j]);
    }
    lse[i * shape.num_heads + h] = std::log(total);
    double* out = &y[i * q.width() + a];
    for (std::int64_t j = first; j <= i; ++j) {
      p[j] /= total;
      for (std::int64_t d = 0; d < dim; ++d) out[d] += p[j] * v(j, b + d);
    }
    for (std::int64_t d = 0; d < dim; ++d) delta += out[d] * grad_y(i, a + d);
    for (std::int64_t j = first; j <= i; ++j) {
      double grad_p = 0;
      for (std::int64_t d = 0; d < dim; ++d) grad_p += grad_y(i, a + d) * v(j, b + d);
      const double grad_s = p[j] * (grad_p - delta) * shape.scale();
      for (std::int64_t d = 0; d < dim; ++d) {
        grad_q[i * q.width() + a + d] += grad_s * k(j, b + d);
        grad_k[j * k.width() + b + d] += grad_s * q(i, a + d);
        grad_v[j * k.width() + b + d] += p[j] * grad_y(i, a + d);
      }
    }
  }
};

/// Pages of several sequences, handed out in random order; memory that nobody wrote is NaN.
struct PagedSequences {
  PagedSequences(const AttentionShape& shape, const std::vector<std::int64_t>& lengths, std::mt19937& rng)
      : shape(shape),
        num_blocks(count_blocks(shape, lengths) + 2),
        page_rows(shape.num_kv_heads * shape.block_size + kGapRows),
        keys(shape.pages, num_blocks * page_rows, shape.head_dim),
        values(shape.pages, num_blocks * page_rows, shape.head_dim) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (const auto length : lengths) {
      sequences.emplace_back(shape, length, rng);
      const auto blocks = (length + shape.block_size - 1) / shape.block_size;
      tables.emplace_back(order.end() - blocks, order.end());
      order.resize(order.size() - static_cast<std::size_t>(blocks));
    }
  }

  KvPages pages() {
    const auto view = [&](Matrix& m) {
      TensorView pages(m.view().data(), shape.pages,
                       {num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim});
      pages.set_stride(0, page_rows * shape.head_dim);
      return pages;
    };
    return {view(keys), view(values)};
  }
  /// Row of `keys` and `values` that holds a position.
  std::int64_t page_row(std::size_t sequence, std::int64_t position, std::int64_t kv_head) const {
    const std::int64_t page = tables[sequence][position / shape.block_size];
    return page * page_rows + kv_head * shape.block_size + position % shape.block_size;
  }
  void fill_pages(OpFixture& ops) {
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const AttentionSpan span{0, sequences[s].length, 0, tables[s].data()};
      ops.run(KvWriteArgs{head_view(sequences[s].k, shape.num_kv_heads),
                          head_view(sequences[s].v, shape.num_kv_heads),
                          pages(),
                          {&span, 1}});
    }
  }

  AttentionShape shape;
  static constexpr std::int64_t kGapRows = 3;  // between pages
  std::int64_t num_blocks, page_rows;
  Matrix keys, values;
  std::vector<Sequence> sequences;
  std::vector<std::vector<std::int32_t>> tables;

 private:
  static std::int64_t count_blocks(const AttentionShape& shape, const std::vector<std::int64_t>& lengths) {
    std::int64_t blocks = 0;
    for (const auto length : lengths) blocks += (length + shape.block_size - 1) / shape.block_size;
    return blocks;
  }
};

/// Of every sequence: grad_k and grad_v, [length, num_kv_heads * head_dim].
using Accumulators = std::vector<std::pair<SharedVector<float>, SharedVector<float>>>;

/// Rows [begin, end) of one sequence, as they stand in a batch.
struct Piece {
  std::size_t sequence;
  std::int64_t begin, end;
};

/// A batch of pieces, its inputs gathered from the sequences and its outputs poisoned. Rows lie `gap` elements apart.
struct Batch {
  Batch(PagedSequences& world, std::vector<Piece> pieces, std::int64_t gap = 0)
      : world(world),
        shape(world.shape),
        pieces(std::move(pieces)),
        gap(gap),
        num_tokens(std::accumulate(this->pieces.begin(), this->pieces.end(), std::int64_t{0},
                                   [](auto n, const Piece& p) { return n + p.end - p.begin; })),
        q(make(shape.rows, shape.num_heads)),
        y(q),
        grad_y(q),
        grad_q(q),
        grad_k(make(shape.rows, shape.num_kv_heads)),
        grad_v(grad_k),
        lse(DType::kFloat32, num_tokens, shape.num_heads, gap) {
    std::int64_t row = 0;
    for (const auto& piece : this->pieces) {
      spans.push_back({row, row + piece.end - piece.begin, piece.begin, world.tables[piece.sequence].data()});
      const Sequence& s = world.sequences[piece.sequence];
      for (std::int64_t i = piece.begin; i < piece.end; ++i, ++row) {
        for (std::int64_t j = 0; j < q.width(); ++j) {
          q.set(row, j, static_cast<float>(s.q(i, j)));
          grad_y.set(row, j, static_cast<float>(s.grad_y(i, j)));
        }
      }
    }
  }

  void forward(OpFixture& ops, bool want_lse = true) {
    ops.run(AttentionArgs{head_view(q, shape.num_heads, gap), world.pages(), spans, head_view(y, shape.num_heads, gap),
                          want_lse ? lse.view() : TensorView(), static_cast<float>(shape.scale()),
                          shape.sliding_window});
  }
  /// Of the pieces that `trains` names; empty: of all.
  void backward(OpFixture& ops, Accumulators& accumulators, const std::vector<bool>& trains = {}) {
    std::vector<AttentionBackwardSpan> windows;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      if (!trains.empty() && !trains[i]) continue;
      auto& [k, v] = accumulators[pieces[i].sequence];
      windows.push_back({spans[i], k.data(), v.data()});
    }
    const auto kv = shape.num_kv_heads;
    ops.run(AttentionBackwardArgs{head_view(grad_y, shape.num_heads, gap), head_view(q, shape.num_heads, gap),
                                  head_view(y, shape.num_heads, gap), lse.view(), world.pages(), windows,
                                  head_view(grad_q, shape.num_heads, gap), head_view(grad_k, kv, gap),
                                  head_view(grad_v, kv, gap), static_cast<float>(shape.scale()), shape.sliding_window});
  }

  /// f(row of the batch, sequence, position)
  template <class F>
  void for_each_row(F&& f) const {
    std::int64_t row = 0;
    for (const auto& piece : pieces)
      for (std::int64_t i = piece.begin; i < piece.end; ++i) f(row++, world.sequences[piece.sequence], i);
  }
  /// Worst error of a tensor of the batch against a tensor of the sequences, relative to 1 + |wanted|.
  double error(const Matrix& got, std::vector<double> Sequence::* wanted) const {
    double worst = 0;
    for_each_row([&](std::int64_t row, const Sequence& s, std::int64_t position) {
      for (std::int64_t j = 0; j < got.width(); ++j) {
        const double w = (s.*wanted)[position * got.width() + j], e = std::abs(got(row, j) - w) / (1 + std::abs(w));
        worst = std::isnan(e) ? std::numeric_limits<double>::infinity() : std::max(worst, e);
      }
    });
    return worst;
  }

  PagedSequences& world;
  AttentionShape shape;
  std::vector<Piece> pieces;
  std::int64_t gap, num_tokens;
  Matrix q, y, grad_y, grad_q, grad_k, grad_v, lse;
  std::vector<AttentionSpan> spans;

 private:
  Matrix make(DType dtype, std::int64_t heads) const { return Matrix(dtype, num_tokens, heads * shape.head_dim, gap); }
};

/// [0, length) cut at random, ascending.
inline std::vector<std::pair<std::int64_t, std::int64_t>> random_cuts(std::int64_t length, std::mt19937& rng) {
  std::vector<std::pair<std::int64_t, std::int64_t>> cuts;
  const std::int64_t longest = std::uniform_int_distribution<std::int64_t>(1, length)(rng);
  for (std::int64_t at = 0; at < length;) {
    const auto end = std::min(length, at + std::uniform_int_distribution<std::int64_t>(1, longest)(rng));
    cuts.emplace_back(at, end);
    at = end;
  }
  return cuts;
}

}  // namespace flexcore::test
