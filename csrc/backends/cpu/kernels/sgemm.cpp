#include "backends/cpu/kernels/sgemm.h"

#include "backends/cpu/kernels/gemm_micro.h"
#include "backends/cpu/kernels/gemm_transpose.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

constexpr int kWidth = kPanels * kPanel;  // columns of a register tile
constexpr int kDepth = 256;               // k in one pass: 256 x 16 floats of b are 16 KiB, half of a small L1
// Below this many tile rows, copying b into a tight block costs more than its strided loads.
constexpr int kPackTiles = 4;

struct Tile {
  const float* a;
  const float* b;
  TileStrides strides;
  std::int64_t k;
  float* c;
  std::int64_t ldc, columns;
  float alpha;
  bool accumulate;
};

template <int Rows>
FLEXCORE_INLINE void store_tile(const Vec (&acc)[Rows][kWidth / kLanes], const Tile& t, float* c, std::int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kWidth / kLanes; ++j) {
      float* out = c + i * ldc + j * kLanes;
      const Vec product = unfused(t.alpha * acc[i][j]);
      store(out, t.accumulate ? load(out) + product : product);
    }
  }
}

template <int Rows>
__attribute__((noinline)) void run_tile(const Tile& t) {
  Vec acc[Rows][kWidth / kLanes] = {};
  multiply_tile<Rows, kPanels>(t.a, t.b, t.strides, t.k, acc);
  if (t.columns == kWidth) {
    store_tile<Rows>(acc, t, t.c, t.ldc);
    return;
  }
  // The last columns go through a whole tile, so that they see the same instructions as all others.
  alignas(64) float edge[Rows * kWidth] = {};
  if (t.accumulate) {
    for (int i = 0; i < Rows; ++i)
      for (std::int64_t j = 0; j < t.columns; ++j) edge[i * kWidth + j] = t.c[i * t.ldc + j];
  }
  store_tile<Rows>(acc, t, edge, kWidth);
  for (int i = 0; i < Rows; ++i)
    for (std::int64_t j = 0; j < t.columns; ++j) t.c[i * t.ldc + j] = edge[i * kWidth + j];
}

template <int Rows = kRows>
void run_rows(std::int64_t rows, const Tile& tile) {
  if (rows >= Rows)
    run_tile<Rows>(tile);
  else if constexpr (Rows > 1)
    run_rows<Rows - 1>(rows, tile);
}

// block[k][j] = b[k, j] for k in [0, num_k), zeros beyond the last column.
void pack_rows(const float* b, std::int64_t ldb, std::int64_t num_k, std::int64_t columns, float* block) {
  for (std::int64_t k = 0; k < num_k; ++k) {
    const float* in = b + k * ldb;
    float* out = block + k * kWidth;
    if (columns == kWidth) {
#pragma GCC unroll 16
      for (int j = 0; j < kWidth / kLanes; ++j) store(out + j * kLanes, load(in + j * kLanes));
    } else {
      for (std::int64_t j = 0; j < columns; ++j) out[j] = in[j];
      for (std::int64_t j = columns; j < kWidth; ++j) out[j] = 0.0f;
    }
  }
}

// The same from the transpose: b[j, k].
void pack_columns(const float* b, std::int64_t ldb, std::int64_t num_k, std::int64_t columns, float* block) {
  for (std::int64_t j = 0; j < kWidth; j += kSquare) {
    std::int64_t k = 0;
    for (; j + kSquare <= columns && k + kSquare <= num_k; k += kSquare) {
      Words r[kSquare];
#pragma GCC unroll 8
      for (int i = 0; i < kSquare; ++i) r[i] = load_words(b + (j + i) * ldb + k);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < kSquare; ++i) store_words(block + (k + i) * kWidth + j, r[i]);
    }
    for (; k < num_k; ++k)
      for (std::int64_t i = j; i < j + kSquare; ++i) block[k * kWidth + i] = i < columns ? b[i * ldb + k] : 0.0f;
  }
}

}  // namespace

void sgemm(const SgemmArgs& g) {
  alignas(64) float block[kDepth * kWidth];
  const std::int64_t a_row = g.transpose_a ? 1 : g.lda, a_k = g.transpose_a ? g.lda : 1;
  for (std::int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kDepth) {
    const std::int64_t num_k = g.k - k0 < kDepth ? g.k - k0 : kDepth;
    for (std::int64_t j0 = 0; j0 < g.n; j0 += kWidth) {
      const std::int64_t columns = g.n - j0 < kWidth ? g.n - j0 : kWidth;
      const bool packed = g.transpose_b || columns < kWidth || g.m >= kPackTiles * kRows;
      if (g.transpose_b)
        pack_columns(g.b + j0 * g.ldb + k0, g.ldb, num_k, columns, block);
      else if (packed)
        pack_rows(g.b + k0 * g.ldb + j0, g.ldb, num_k, columns, block);
      Tile tile{g.a + k0 * a_k,
                packed ? block : g.b + k0 * g.ldb + j0,
                {a_row, a_k, packed ? kWidth : g.ldb, kPanel},
                num_k,
                g.c + j0,
                g.ldc,
                columns,
                g.alpha,
                g.accumulate || k0 > 0};
      // Tiles of about equal height: a low one would wait for its own sums.
      const std::int64_t tiles = (g.m + kRows - 1) / kRows;
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::int64_t top = g.m * i / tiles, rows = g.m * (i + 1) / tiles - top;
        run_rows(rows, tile);
        tile.a += rows * a_row;
        tile.c += rows * g.ldc;
      }
    }
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
