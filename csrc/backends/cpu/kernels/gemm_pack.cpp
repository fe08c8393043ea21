#include "backends/cpu/kernels/gemm_pack.h"

#include "backends/cpu/kernels/gemm_transpose.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

using flexcore::to_float;

// out[k][16][step]: `step` neighbours in k lie together.
template <class From, class To>
void pack_panel(const PackPanels& g, std::int64_t panel, To* out) {
  constexpr int kStep = sizeof(To) == 2 ? 2 : 1;
  const auto* source = static_cast<const From*>(g.source) + panel * kPanel * g.stride;
  const std::int64_t left = g.rows - panel * kPanel, rows = left < kPanel ? left : kPanel;
  for (std::int64_t k = 0; k < g.k; k += kStep) {
    To* line = out + k * kPanel;
    for (int s = 0; s < kStep; ++s) {
      const bool inside = k + s < g.k;
      for (std::int64_t j = 0; j < rows; ++j)
        line[j * kStep + s] = from_float<To>(inside ? to_float(source[j * g.stride + k + s]) : 0.0f);
      for (std::int64_t j = rows; j < kPanel; ++j) line[j * kStep + s] = from_float<To>(0.0f);
    }
  }
}

template <class From>
void pack_from(const PackPanels& g) {
  const std::int64_t depth = g.to == Element::kBFloat16 ? (g.k + 1) / 2 * 2 : g.k;
  for (std::int64_t panel = g.begin; panel < g.end; ++panel) {
    const std::int64_t at = (panel - g.begin) * depth * kPanel;
    if (g.to == Element::kBFloat16)
      pack_panel<From>(g, panel, static_cast<bfloat16*>(g.packed) + at);
    else
      pack_panel<From>(g, panel, static_cast<float*>(g.packed) + at);
  }
}

// `rounded`: through bfloat16 and back.
template <class From, class To>
void convert(const ConvertRows& g, bool rounded) {
  for (std::int64_t i = 0; i < g.rows; ++i) {
    const auto* x = static_cast<const From*>(g.x) + i * g.stride;
    auto* out = static_cast<To*>(g.out) + i * g.padded_k;
    if (rounded) {
      for (std::int64_t k = 0; k < g.k; ++k) out[k] = from_float<To>(to_float(to_bfloat16(to_float(x[k]))));
    } else {
      for (std::int64_t k = 0; k < g.k; ++k) out[k] = from_float<To>(to_float(x[k]));
    }
    for (std::int64_t k = g.k; k < g.padded_k; ++k) out[k] = from_float<To>(0.0f);
  }
}

// Part of each line, zeros past the matrix's last one.
FLEXCORE_INLINE void load_lines(const std::uint32_t* lines, std::int64_t count, Words (&r)[kSquare]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSquare; ++i) r[i] = i < count ? load_words(lines + i * kPanel) : Words{};
}

FLEXCORE_INLINE Words widen(Halves h) { return __builtin_convertvector(h, Words); }

// One 16 x 16 block: lines of 16 n -> lines of 16 k.
void transpose_float32(const std::uint32_t* in, std::int64_t lines, std::uint32_t* out) {
  for (int k = 0; k < kPanel; k += kSquare) {
    for (int n = 0; n < kPanel; n += kSquare) {
      Words r[kSquare];
      load_lines(in + k * kPanel + n, lines - k, r);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < kSquare; ++i) store_words(out + (n + i) * kPanel + k, r[i]);
    }
  }
}

// The same from lines of 16 pairs of k: to floats, or to lines of 16 pairs of n.
void transpose_pairs(const std::uint32_t* in, std::int64_t lines, std::uint32_t* out) {
  struct Split {
    Halves low, high;
  };
  for (int k = 0; k < kPanel; k += 2 * kSquare) {
    for (int n = 0; n < kPanel; n += kSquare) {
      Words r[kSquare];
      load_lines(in + k / 2 * kPanel + n, lines - k / 2, r);
      transpose(r);  // r[i]: k .. k + 2 kSquare of row n + i
#pragma GCC unroll 8
      for (int i = 0; i < kSquare; i += kPairs ? 2 : 1) {
        const auto row = __builtin_bit_cast(Split, r[i]);
        if constexpr (kPairs) {
          const auto odd = __builtin_bit_cast(Split, r[i + 1]);
          std::uint32_t* line = out + (n + i) / 2 * kPanel + k;
          store_words(line, widen(row.low) | widen(odd.low) << 16);
          store_words(line + kSquare, widen(row.high) | widen(odd.high) << 16);
        } else {
          std::uint32_t* line = out + (n + i) * kPanel + k;
          store_words(line, widen(row.low) << 16);
          store_words(line + kSquare, widen(row.high) << 16);
        }
      }
    }
  }
}

template <class From, class To>
void gather(const GatherWeightRows& g) {
  constexpr int kStep = sizeof(From) == 2 ? 2 : 1;
  const auto* weight = static_cast<const From*>(g.weight);
  const std::int64_t depth = (g.k + kStep - 1) / kStep * kStep;
  for (std::int64_t i = 0; i < g.count; ++i) {
    const std::int64_t id = g.ids[i];
    To* y = static_cast<To*>(g.y) + i * g.y_stride;
    if (g.packed) {
      const From* in = weight + id / kPanel * depth * kPanel + id % kPanel * kStep;
      for (std::int64_t k = 0; k < g.k; ++k)
        y[k] = from_float<To>(to_float(in[k / kStep * kStep * kPanel + k % kStep]));
    } else {
      const From* in = weight + id * g.k;
      for (std::int64_t k = 0; k < g.k; ++k) y[k] = from_float<To>(to_float(in[k]));
    }
  }
}

}  // namespace

void pack_panels(const PackPanels& g) {
  if (g.from == Element::kFloat32)
    pack_from<float>(g);
  else if (g.from == Element::kBFloat16)
    pack_from<bfloat16>(g);
  else
    pack_from<float16>(g);
}

void convert_rows(const ConvertRows& g) {
  const bool narrow = g.weight == Element::kBFloat16;
  if (narrow && kPairs) {
    g.from == Element::kFloat32 ? convert<float, bfloat16>(g, false) : convert<bfloat16, bfloat16>(g, false);
  } else {
    g.from == Element::kFloat32 ? convert<float, float>(g, narrow) : convert<bfloat16, float>(g, false);
  }
}

void transpose_panels(const TransposePanels& g) {
  const bool narrow = g.weight == Element::kBFloat16;
  const int lines_a_block = narrow ? kPanel / 2 : kPanel;
  const std::int64_t lines = narrow ? (g.k + 1) / 2 : g.k;  // of one panel of the weight
  const std::int64_t blocks = (g.n_end - g.n_begin) / kPanel;
  const std::int64_t out_block = kPanel * kPanel / (narrow && kPairs ? 2 : 1);
  // The weight is read in long runs, one panel after the other, with the next panel's lines on their way.
  for (std::int64_t block = 0; block < blocks; ++block) {
    const auto* panel = static_cast<const std::uint32_t*>(g.packed) + (g.n_begin / kPanel + block) * lines * kPanel;
    auto* out = static_cast<std::uint32_t*>(g.out) + block * out_block;
    for (std::int64_t kb = g.k_begin; kb < g.k_end; ++kb) {
      const std::int64_t line = kb * lines_a_block;
      const std::uint32_t* in = panel + line * kPanel;
      for (int i = 0; i < lines_a_block; ++i) __builtin_prefetch(in + (lines + i) * kPanel, 0, 2);
      narrow ? transpose_pairs(in, lines - line, out) : transpose_float32(in, lines - line, out);
      out += blocks * out_block;
    }
  }
}

void widen_lines(const WidenLines& g) {
  const auto* in = static_cast<const std::uint32_t*>(g.packed);
  for (std::int64_t i = 0; i < g.lines; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kPanel; j += kLanes) {
      const VecU pairs = load(in + i * kPanel + j);
      store(g.out + 2 * i * kPanel + j, (Vec)(pairs << 16));
      store(g.out + (2 * i + 1) * kPanel + j, (Vec)(pairs & 0xffff0000u));
    }
  }
}

void gather_weight_rows(const GatherWeightRows& g) {
  const bool to_float32 = g.to == Element::kFloat32;
  if (g.from == Element::kFloat32)
    to_float32 ? gather<float, float>(g) : gather<float, bfloat16>(g);
  else
    to_float32 ? gather<bfloat16, float>(g) : gather<bfloat16, bfloat16>(g);
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
