#include "backends/cpu/kernels/gemm_tiles.h"
#include "backends/cpu/kernels/quantized_lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

template <bool kPaired>
struct LeftOperand {
  using A = float;
  static constexpr int kAStep = 1;
};
#if defined(FLEXCORE_ISA_avx512_bf16)
template <>
struct LeftOperand<true> {
  using A = Pair;
  static constexpr int kAStep = 2;
};
#endif

/// Quantised panels, decoded in registers: where rows are so few that they are read once anyhow. The additions, and so
/// the bits, are those of the panels that dequantize_panels makes.
template <Codes kCodes, bool kRounded>
struct Quantized : LeftOperand<kRounded && kPairs> {
  using typename LeftOperand<kRounded && kPairs>::A;
  using B = std::uint8_t;
  static constexpr int kBStep = 1, kTileRows = kRowsDecoded, kMostPanels = kPanelsDecoded;
  static constexpr std::int64_t kPairBytes = kCodes == Codes::kInt8 ? 2 * kPanel : kPanel;

  template <int Rows, int kVecs>
  static FLEXCORE_INLINE void add(const A* a, std::int64_t a_row, const Vec (&b)[kVecs], Vec (&acc)[Rows][kVecs]) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const float x = a[i * a_row];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * b[j];
    }
  }

  template <int Rows, int Panels>
  static FLEXCORE_INLINE void multiply(const Tile<Quantized>& t, Vec (&acc)[Rows][Panels * kPanelVecs]) {
    constexpr int kVecs = Panels * kPanelVecs;
    const std::int64_t k = t.block->k, group = t.block->group;
    const A* a = t.a;
    const B* parameters = t.b;
    for (std::int64_t begin = 0; begin < k; begin += group) {
      Decoder<kCodes> decoders[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j)
        decoders[j].load_parameters(parameters + j / kPanelVecs * t.b_panel, j % kPanelVecs * kLanes);
      const B* line = parameters + QuantizedLayout::kParameterBytes;
      const std::int64_t count = k - begin < group ? k - begin : group;
      for (std::int64_t l = 0; l < count; l += 2) {
        Vec even[kVecs], odd[kVecs];
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) {
          decoders[j].pair(line + j / kPanelVecs * t.b_panel + j % kPanelVecs * kLanes, even[j], odd[j]);
          if constexpr (kRounded) {
            even[j] = as_bfloat16(even[j]);
            odd[j] = as_bfloat16(odd[j]);
          }
        }
        if constexpr (kRounded && kPairs) {
#if defined(FLEXCORE_ISA_avx512_bf16)
#pragma GCC unroll 16
          for (int i = 0; i < Rows; ++i) {
            const std::uint32_t x = a[i * t.a_row];
#pragma GCC unroll 16
            for (int j = 0; j < kVecs; ++j) acc[i][j] = dot_pairs(acc[i][j], x, (VecU)even[j] >> 16 | (VecU)odd[j]);
          }
          ++a;
#endif
        } else {
          add<Rows>(a, t.a_row, even, acc);
          if (l + 1 < count) add<Rows>(a + 1, t.a_row, odd, acc);
          a += 2;
        }
        line += kPairBytes;
      }
      parameters += QuantizedLayout::kParameterBytes + group / 2 * kPairBytes;
    }
  }
};

template <Codes kCodes>
void multiply_codes(const GemmBlock& g, bool rounded) {
  rounded ? multiply<Quantized<kCodes, true>>(g) : multiply<Quantized<kCodes, false>>(g);
}

}  // namespace

void multiply_quantized(const GemmBlock& g, Codes codes, bool rounded) {
  if (codes == Codes::kInt8)
    multiply_codes<Codes::kInt8>(g, rounded);
  else if (codes == Codes::kInt4)
    multiply_codes<Codes::kInt4>(g, rounded);
  else
    multiply_codes<Codes::kNf4>(g, rounded);
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
