#pragma once

#include "backends/cpu/kernels/gemm.h"
#include "backends/cpu/kernels/gemm_micro.h"

// A GemmBlock as register tiles. A kind of product says what the operands are and how a tile adds up:
//   struct Kind {
//     using A, B;                             elements of a and b
//     static constexpr int kAStep, kBStep;    k in one of them
//     static constexpr int kTileRows, kMostPanels;
//     template <int Rows, int Panels>
//     static void multiply(const Tile<Kind>&, Vec (&acc)[Rows][Panels * kPanelVecs]);
//   };
namespace flexcore::cpu::FLEXCORE_ISA {

// Rows of a that are used panel after panel: with their range of k they should fill a part of the second-level cache.
inline constexpr std::int64_t kBlockBytes = 160 << 10;

// One register tile, in elements of Kind::A and Kind::B.
template <class Kind>
struct Tile {
  const typename Kind::A* a;
  const typename Kind::B* b;
  std::int64_t a_row, b_panel;
  std::int64_t row, column;  // of its first element
  const GemmBlock* block;
};

// The general way out: through memory, for bias, bfloat16 and the last columns. Same additions as the short way.
__attribute__((noinline)) inline void write_tile(float* tile, int rows, int width, const GemmBlock& g, std::int64_t row,
                                                 std::int64_t column) {
  const std::int64_t columns = g.columns - column < width ? g.columns - column : width;
  for (int i = 0; i < rows; ++i) {
    float* __restrict sum = tile + i * width;
    const std::int64_t at = (row + i) * g.y_stride + column;
    if (g.bias != nullptr) {
      for (std::int64_t j = 0; j < columns; ++j) sum[j] += g.bias[column + j];
    }
    if (g.to == Element::kBFloat16) {
      auto* y = static_cast<bfloat16*>(g.y) + at;
      for (std::int64_t j = 0; j < columns; ++j) y[j] = to_bfloat16(g.accumulate ? to_float(y[j]) + sum[j] : sum[j]);
    } else {
      auto* y = static_cast<float*>(g.y) + at;
      for (std::int64_t j = 0; j < columns; ++j) y[j] = g.accumulate ? y[j] + sum[j] : sum[j];
    }
  }
}

template <class Kind, int Rows, int Panels>
__attribute__((noinline)) void run_tile(const Tile<Kind>& t) {
  constexpr int kWidth = Panels * kPanel, kVecs = Panels * kPanelVecs;
  const GemmBlock& g = *t.block;
  const std::int64_t width = g.panels * kPanel;
  float* partial = g.first && g.last ? nullptr : g.partial + t.row * width + t.column;
  Vec acc[Rows][kVecs] = {};
  if (!g.first) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] = load(partial + i * width + j * kLanes);
    }
  }
  Kind::template multiply<Rows, Panels>(t, acc);
  float* out = partial;
  std::int64_t stride = width;
  bool add = false;
  alignas(64) float tile[Rows * kWidth];
  const bool direct = g.last && g.to == Element::kFloat32 && g.bias == nullptr && t.column + kWidth <= g.columns;
  if (direct) {
    out = static_cast<float*>(g.y) + t.row * g.y_stride + t.column;
    stride = g.y_stride;
    add = g.accumulate;
  } else if (g.last) {
    out = tile;
    stride = kWidth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      float* y = out + i * stride + j * kLanes;
      store(y, add ? load(y) + acc[i][j] : acc[i][j]);
    }
  }
  if (g.last && !direct) write_tile(tile, Rows, kWidth, g, t.row, t.column);
}

// Panels side by side in a tile of so many rows: a power of two, as many as the registers hold.
template <class Kind>
constexpr int panels_beside(int rows) {
  int panels = 1;
  while (panels < Kind::kMostPanels && rows * panels * 2 <= Kind::kTileRows * kPanels) panels *= 2;
  return panels;
}

template <class Kind, int Rows, int Panels>
void run_strip(Tile<Kind>& tile, std::int64_t panels) {
  if constexpr (Panels > 0) {
    for (; panels >= Panels; panels -= Panels) {
      run_tile<Kind, Rows, Panels>(tile);
      tile.b += Panels * tile.b_panel;
      tile.column += Panels * kPanel;
    }
    run_strip<Kind, Rows, Panels / 2>(tile, panels);
  }
}

// At most kTileRows rows over neighbouring panels.
template <class Kind, int Rows = Kind::kTileRows>
void run_rows(std::int64_t rows, Tile<Kind> tile, std::int64_t panels) {
  if (rows >= Rows)
    run_strip<Kind, Rows, panels_beside<Kind>(Rows)>(tile, panels);
  else if constexpr (Rows > 1)
    run_rows<Kind, Rows - 1>(rows, tile, panels);
}

template <class Kind>
void multiply(const GemmBlock& g) {
  constexpr std::int64_t kTileRows = Kind::kTileRows;
  const auto* a = static_cast<const typename Kind::A*>(g.a);
  const auto* b = static_cast<const typename Kind::B*>(g.b);
  const std::int64_t a_row = g.a_stride / Kind::kAStep, b_panel = g.b_panel / Kind::kBStep;
  const auto run = [&](std::int64_t row, std::int64_t rows, std::int64_t panel, std::int64_t panels) {
    run_rows<Kind>(rows, {a + row * a_row, b + panel * b_panel, a_row, b_panel, row, panel * kPanel, &g}, panels);
  };
  if (g.rows <= kTileRows) {
    run(0, g.rows, 0, g.panels);
    return;
  }
  const std::int64_t row_bytes = (g.k + 1) / Kind::kAStep * 4,
                     fitting = kBlockBytes / row_bytes / kTileRows * kTileRows;
  const std::int64_t block = fitting > 4 * kTileRows ? fitting : 4 * kTileRows;
  for (std::int64_t begin = 0; begin < g.rows; begin += block) {
    // Tiles of about equal height: a low one would wait for its own sums.
    const std::int64_t rows = g.rows - begin < block ? g.rows - begin : block,
                       tiles = (rows + kTileRows - 1) / kTileRows;
    for (std::int64_t panel = 0; panel < g.panels; panel += kPanels) {
      const std::int64_t panels = g.panels - panel < kPanels ? g.panels - panel : kPanels;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const std::int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
        run(begin + top, bottom - top, panel, panels);
      }
    }
  }
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
