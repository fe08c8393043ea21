#include "backends/cpu/kernels/lora.h"

#include "backends/cpu/kernels/transpose.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

constexpr int kWidth = 2 * kLanes;  // columns of a register tile
constexpr int kTileRows = 6;        // 6 x 2 sums, 2 vectors of b and one of u: 15 of 16 registers
constexpr int kMaxRank = 256;
constexpr int kPanelFloats = kMaxRank * 2 * 16;  // 32 KiB: at rank 16, 512 columns of b
constexpr int kGradientRows = 256;               // rows of x in one pass: 16 KiB of a 32 KiB L1 on AVX2

// ---- shrink: sums of products along k, each with its own vector of partial sums -------------------------------------

template <int Rows, int Ranks>
FLEXCORE_INLINE void dot_tile(const LoraShrink& t, const float* x, const float* a, float* u) {
  Vec acc[Rows][Ranks] = {};
  sweep(0, t.k, [&](auto block) {
    Vec xv[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) xv[i] = block.get(x + i * t.x_stride);
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const Vec av = block.get(a + r * t.a_stride);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) acc[i][r] += xv[i] * av;
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      float& out = u[i * t.u_stride + r];
      const float sum = reduce_add(acc[i][r]);
      out = t.accumulate ? out + sum : sum;
    }
}

template <int Rows, int Ranks>
__attribute__((noinline)) std::int64_t shrink_ranks(const LoraShrink& t, std::int64_t row, std::int64_t r) {
  for (; r + Ranks <= t.ranks; r += Ranks)
    dot_tile<Rows, Ranks>(t, t.x + row * t.x_stride, t.a + r * t.a_stride, t.u + row * t.u_stride + r);
  return r;
}

void shrink(const LoraShrink& t) {
  // Four rows of a stay in L1 while the rows of x pass by; a single row wants more sums in flight instead.
  std::int64_t r = t.rows == 1 ? shrink_ranks<1, 8>(t, 0, 0) : 0;
  for (; r < t.ranks; r += 4) {
    LoraShrink part = t;
    part.a += r * t.a_stride;
    part.u += r;
    part.ranks = t.ranks - r < 4 ? t.ranks - r : 4;
    std::int64_t row = 0;
    for (; row + 3 <= t.rows; row += 3) shrink_ranks<3, 1>(part, row, shrink_ranks<3, 4>(part, row, 0));
    for (; row < t.rows; ++row) shrink_ranks<1, 1>(part, row, shrink_ranks<1, 4>(part, row, 0));
  }
}

// ---- expand and gradient: outer products, acc[i][j] += a(i, k) * b[k][j], k ascending ------------------------------

template <int Rows>
FLEXCORE_INLINE void outer_tile(const float* a, std::int64_t a_row, std::int64_t a_k, const float* b,
                                std::int64_t num_k, Vec (&acc)[Rows][2]) {
  for (std::int64_t k = 0; k < num_k; ++k) {
    const Vec b0 = load(b + k * kWidth), b1 = load(b + k * kWidth + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const float x = a[i * a_row + k * a_k];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
}

/// The columns of one register tile that lie in the matrix.
template <class F>
FLEXCORE_INLINE void two_vectors(std::int64_t columns, F&& f) {
  if (columns >= kWidth) {
    f(0, Whole{0});
    f(1, Whole{kLanes});
    return;
  }
  if (columns >= kLanes)
    f(0, Whole{0});
  else
    f(0, Part{0, columns});
  if (columns > kLanes) f(1, Part{kLanes, columns - kLanes});
}

template <int Rows, class Y>
__attribute__((noinline)) void expand_tile(const LoraExpand& t, const float* panel, std::int64_t row,
                                           std::int64_t column) {
  Vec acc[Rows][2] = {};
  outer_tile<Rows>(t.u + row * t.u_stride, t.u_stride, 1, panel, t.rank, acc);
  Y* y = static_cast<Y*>(t.y) + row * t.y_stride + column;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
    two_vectors(t.end - column, [&](int j, auto block) {
      block.put(y + i * t.y_stride, block.get(y + i * t.y_stride) + t.scaling * acc[i][j]);
    });
}

template <class Y, int Rows = kTileRows>
FLEXCORE_INLINE void expand_rows(const LoraExpand& t, const float* panel, std::int64_t row, std::int64_t column) {
  if (t.rows - row >= Rows)
    expand_tile<Rows, Y>(t, panel, row, column);
  else if constexpr (Rows > 1)
    expand_rows<Y, Rows - 1>(t, panel, row, column);
}

// panel[r][j] = b(r, column + j), zeros beyond the last column.
FLEXCORE_INLINE void pack_b(const LoraExpand& t, std::int64_t column, float* panel) {
  const std::int64_t columns = t.end - column < kWidth ? t.end - column : kWidth;
  if (!t.b_by_rank) {
    transpose_rows(t.b + column * t.b_stride, t.b_stride, columns, t.rank, panel, kWidth, kWidth);
    return;
  }
  for (std::int64_t r = 0; r < t.rank; ++r) {
    const float* b = t.b + r * t.b_stride + column;
    if (columns < kWidth) store(panel + r * kWidth + kLanes, Vec{});
    two_vectors(columns, [&](int, auto block) { store(panel + r * kWidth + block.i, block.get(b)); });
  }
}

// Row by row over as many panels as L1 holds, so that y is walked along its rows.
template <class Y>
void expand(const LoraExpand& t) {
  alignas(64) float panels[kPanelFloats];
  const std::int64_t panel_floats = t.rank * kWidth, step = kPanelFloats / panel_floats * kWidth;
  for (std::int64_t first = t.begin; first < t.end; first += step) {
    const std::int64_t last = first + step < t.end ? first + step : t.end;
    float* panel = panels;
    for (std::int64_t column = first; column < last; column += kWidth, panel += panel_floats) pack_b(t, column, panel);
    for (std::int64_t row = 0; row < t.rows; row += kTileRows) {
      panel = panels;
      for (std::int64_t column = first; column < last; column += kWidth, panel += panel_floats)
        expand_rows<Y>(t, panel, row, column);
    }
  }
}

template <int Rows>
__attribute__((noinline)) void gradient_tile(const float* w, std::int64_t w_stride, const float* panel,
                                             std::int64_t rows, float* sum) {
  Vec acc[Rows][2] = {};
  outer_tile<Rows>(w, 1, w_stride, panel, rows, acc);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    store(sum + i * kWidth, load(sum + i * kWidth) + acc[i][0]);
    store(sum + i * kWidth + kLanes, load(sum + i * kWidth + kLanes) + acc[i][1]);
  }
}

// sum[r] += the products of one block of rows, for all ranks. Tiles of 4 where 6 would leave 1 or 2 over: too few sums
// to hide the latency of the additions.
void gradient_block(const float* w, std::int64_t w_stride, std::int64_t rank, const float* panel, std::int64_t rows,
                    float* sum) {
  for (std::int64_t r = 0; r < rank;) {
    const std::int64_t left = rank - r;
    const auto run = [&](auto tile, int ranks) {
      tile(w + r, w_stride, panel, rows, sum + r * kWidth);
      r += ranks;
    };
    if (left >= kTileRows && left != 7 && left != 8)
      run(gradient_tile<kTileRows>, kTileRows);
    else if (left >= 4)
      run(gradient_tile<4>, 4);
    else if (left == 3)
      run(gradient_tile<3>, 3);
    else if (left == 2)
      run(gradient_tile<2>, 2);
    else
      run(gradient_tile<1>, 1);
  }
}

// Adds a tile of sums to the gradient; in the by_column form it is turned around first.
void add_gradient(const LoraGradient& t, float* sum, std::int64_t column) {
  const std::int64_t columns = t.end - column < kWidth ? t.end - column : kWidth;
  if (!t.by_column) {
    for (std::int64_t r = 0; r < t.rank; ++r) {
      float* grad = t.grad + r * t.columns + column;
      two_vectors(columns, [&](int, auto block) {
        block.put(grad, block.get(grad) + t.scaling * load(sum + r * kWidth + block.i));
      });
    }
    return;
  }
  alignas(64) float turned[kWidth * kMaxRank];
  const std::int64_t padded = (t.rank + kLanes - 1) / kLanes * kLanes;
  transpose_rows(sum, kWidth, t.rank, kWidth, turned, padded, padded);
  for (std::int64_t j = 0; j < columns; ++j) {
    float* grad = t.grad + (column + j) * t.rank;
    const float* add = turned + j * padded;
    sweep(0, t.rank, [&](auto block) { block.put(grad, block.get(grad) + t.scaling * block.get(add)); });
  }
}

template <class X>
void gradient(const LoraGradient& t) {
  alignas(64) float panel[kGradientRows * kWidth];
  alignas(64) float sum[kMaxRank * kWidth];
  for (std::int64_t column = t.begin; column < t.end; column += kWidth) {
    for (std::int64_t r = 0; r < t.rank * kWidth; r += kLanes) store(sum + r, Vec{});
    const std::int64_t columns = t.end - column < kWidth ? t.end - column : kWidth;
    if (columns < kWidth)
      for (std::int64_t i = 0; i < kGradientRows * kWidth; i += kLanes) store(panel + i, Vec{});
    for (std::int64_t row = 0; row < t.rows; row += kGradientRows) {
      const std::int64_t rows = t.rows - row < kGradientRows ? t.rows - row : kGradientRows;
      for (std::int64_t i = 0; i < rows; ++i) {
        const X* x = static_cast<const X*>(t.x) + (row + i) * t.x_stride + column;
        two_vectors(columns, [&](int, auto block) { store(panel + i * kWidth + block.i, block.get(x)); });
      }
      gradient_block(t.w + row * t.w_stride, t.w_stride, t.rank, panel, rows, sum);
    }
    add_gradient(t, sum, column);
  }
}

void transpose(const float* in, std::int64_t in_stride, std::int64_t rows, std::int64_t columns, float* out,
               std::int64_t out_stride) {
  const std::int64_t whole = rows / kLanes * kLanes;
  transpose_rows(in, in_stride, whole, columns, out, out_stride, whole);
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t r = whole; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

}  // namespace

const LoraKernels& lora_kernels() {
  static constexpr LoraKernels kTable = {
      shrink, {expand<float>, expand<bfloat16>}, {gradient<float>, gradient<bfloat16>}, transpose, 2 * kLanes};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
