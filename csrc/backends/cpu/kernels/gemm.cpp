#include "backends/cpu/kernels/gemm.h"

#include "backends/cpu/kernels/gemm_pack.h"
#include "backends/cpu/kernels/gemm_tiles.h"
#include "backends/cpu/kernels/sgemm.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

template <bool kPrefetch>
struct Float32 {
  using A = float;
  using B = float;
  static constexpr int kAStep = 1, kBStep = 1;  // k in one element
  static constexpr int kTileRows = kRows, kMostPanels = 4;
  template <int Rows, int Panels>
  static FLEXCORE_INLINE void multiply(const Tile<Float32>& t, Vec (&acc)[Rows][Panels * kPanelVecs]) {
    multiply_tile<Rows, Panels, kPrefetch>(t.a, t.b, {t.a_row, 1, kPanel, t.b_panel}, t.block->k, acc);
  }
};

#if defined(FLEXCORE_ISA_avx512_bf16)
struct BFloat16 {
  using A = Pair;
  using B = std::uint32_t;
  static constexpr int kAStep = 2, kBStep = 2, kTileRows = kRows, kMostPanels = 4;
  template <int Rows, int Panels>
  static FLEXCORE_INLINE void multiply(const Tile<BFloat16>& t, Vec (&acc)[Rows][Panels * kPanelVecs]) {
    multiply_tile_pairs<Rows, Panels>(t.a, t.a_row, t.b, t.b_panel, t.block->k / 2, acc);
  }
};
#else
struct BFloat16 {
  using A = float;
  using B = std::uint32_t;
  static constexpr int kAStep = 1, kBStep = 2, kTileRows = kRowsWidened, kMostPanels = 4;
  template <int Rows, int Panels>
  static FLEXCORE_INLINE void multiply(const Tile<BFloat16>& t, Vec (&acc)[Rows][Panels * kPanelVecs]) {
    multiply_tile_widened<Rows, Panels>(t.a, t.a_row, t.b, t.b_panel, t.block->k / 2, acc);
  }
};
#endif

void multiply_float32(const GemmBlock& g) { g.in_cache ? multiply<Float32<false>>(g) : multiply<Float32<true>>(g); }

}  // namespace

const GemmKernels& gemm_kernels() {
  static constexpr GemmKernels kTable{.tile_rows = kRows,
                                      .pairs = kPairs,
                                      .pack_panels = pack_panels,
                                      .convert_rows = convert_rows,
                                      .transpose_panels = transpose_panels,
                                      .widen_lines = widen_lines,
                                      .gather_rows = gather_weight_rows,
                                      .multiply_float32 = multiply_float32,
                                      .multiply_bfloat16 = multiply<BFloat16>,
                                      .sgemm = sgemm};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
