#include "backends/cpu/kernels/quantized.h"

#include "backends/cpu/kernels/gemm_pack.h"
#include "backends/cpu/kernels/quantized_lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer

constexpr float kLargest = 3.3895314e38f;  // of bfloat16

FLEXCORE_INLINE bfloat16 to_finite_bfloat16(float x) {
  return to_bfloat16(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x);
}

// Codes are chosen against the rounded minimum and scale, which are what they will be read with.
void encode_affine(const float* x, std::int64_t count, float levels, bfloat16& scale, bfloat16& min,
                   std::uint8_t* codes) {
  float low = x[0], high = x[0];
  for (std::int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  min = to_finite_bfloat16(low);
  const float m = to_float(min);
  float step = high > m ? (high - m) / levels : 0.0f;
  if (step * 1.01f * levels > kLargest) step = 0.99f * kLargest / levels;  // so that code * scale is finite
  scale = to_bfloat16(step);
  const float s = to_float(scale);
  for (std::int64_t i = 0; i < count; ++i) {
    float q = s > 0.0f ? (x[i] - m) / s : 0.0f;
    q = q < 0.0f ? 0.0f : q < levels ? q : levels;
    codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>((q + kRound) - kRound));
  }
}

// The level nearest to x / absmax.
void encode_nf4(const float* x, std::int64_t count, float& absmax, std::uint8_t* codes) {
  absmax = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = x[i] < 0.0f ? -x[i] : x[i];
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    const float q = absmax > 0.0f ? x[i] / absmax : 0.0f;
    int code = 0;
    for (int level = 0; level < 15; ++level) code += q > 0.5f * (kNf4Levels[level] + kNf4Levels[level + 1]) ? 1 : 0;
    codes[i] = static_cast<std::uint8_t>(code);
  }
}

template <class From>
void quantize_panel(const QuantizePanels& g, std::int64_t panel, std::uint8_t* out) {
  const QuantizedLayout& layout = g.layout;
  const std::int64_t left = g.rows - panel * kPanel, rows = left < kPanel ? left : kPanel;
  float values[kMostGroup];
  std::uint8_t codes[kMostGroup];
  for (std::int64_t i = 0; i < layout.panel_bytes(); ++i) out[i] = 0;
  for (std::int64_t j = 0; j < rows; ++j) {
    const auto* row = static_cast<const From*>(g.source) + (panel * kPanel + j) * g.stride;
    for (std::int64_t begin = 0; begin < layout.k; begin += layout.group) {
      const std::int64_t count = layout.k - begin < layout.group ? layout.k - begin : layout.group;
      std::uint8_t* group = out + begin / layout.group * layout.group_bytes();
      for (std::int64_t i = 0; i < count; ++i) values[i] = to_float(row[begin + i]);
      if (layout.codes == Codes::kNf4) {
        encode_nf4(values, count, reinterpret_cast<float*>(group)[j], codes);
      } else {
        auto* parameters = reinterpret_cast<bfloat16*>(group);
        encode_affine(values, count, layout.codes == Codes::kInt8 ? 255.0f : 15.0f, parameters[j],
                      parameters[kPanel + j], codes);
      }
      std::uint8_t* line = group + QuantizedLayout::kParameterBytes + j;
      if (layout.codes == Codes::kInt8) {
        for (std::int64_t i = 0; i < count; ++i) line[i * kPanel] = codes[i];
      } else {
        for (std::int64_t i = 0; i < count; ++i)
          line[i / 2 * kPanel] |= static_cast<std::uint8_t>(codes[i] << (i % 2 * 4));
      }
    }
  }
}

template <class From>
void quantize_from(const QuantizePanels& g) {
  for (std::int64_t panel = g.begin; panel < g.end; ++panel)
    quantize_panel<From>(g, panel, g.packed + (panel - g.begin) * g.layout.panel_bytes());
}

// Where two k go: to two lines of floats, or to one of pairs.
struct Floats {
  using Out = float;
  static constexpr int kLines = 2;
  FLEXCORE_INLINE static void put(float* line, Vec even, Vec odd) {
    store(line, even);
    store(line + kPanel, odd);
  }
};
struct RoundedFloats {
  using Out = float;
  static constexpr int kLines = 2;
  FLEXCORE_INLINE static void put(float* line, Vec even, Vec odd) {
    store(line, as_bfloat16(even));
    store(line + kPanel, as_bfloat16(odd));
  }
};
struct Pairs {
  using Out = std::uint32_t;
  static constexpr int kLines = 1;
  FLEXCORE_INLINE static void put(std::uint32_t* line, Vec even, Vec odd) {
    *reinterpret_cast<LooseVecU*>(line) =
        __builtin_bit_cast(VecU, as_bfloat16(even)) >> 16 | __builtin_bit_cast(VecU, as_bfloat16(odd));
  }
};

template <Codes kCodes, class Form>
void dequantize(const DequantizePanels& g) {
  const QuantizedLayout& layout = g.layout;
  constexpr std::int64_t kPairBytes = kCodes == Codes::kInt8 ? 2 * kPanel : kPanel;
  for (std::int64_t panel = 0; panel < g.panels; ++panel) {
    const std::uint8_t* in = g.packed + panel * layout.panel_bytes();
    auto* out = static_cast<typename Form::Out*>(g.out) + panel * g.out_panel * Form::kLines / 2;
    for (std::int64_t k = g.begin; k < g.end;) {
      const std::int64_t index = k / layout.group, next = (index + 1) * layout.group;
      const std::int64_t end = next < g.end ? next : g.end;
      const std::uint8_t* group = in + index * layout.group_bytes();
      const std::uint8_t* line = group + QuantizedLayout::kParameterBytes + (k - index * layout.group) / 2 * kPairBytes;
      Decoder<kCodes> decoders[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) decoders[v].load_parameters(group, v * kLanes);
      for (; k < end; k += 2) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) {
          Vec even, odd;
          decoders[v].pair(line + v * kLanes, even, odd);
          Form::put(out + v * kLanes, even, odd);
        }
        line += kPairBytes;
        out += Form::kLines * kPanel;
      }
    }
  }
}

template <Codes kCodes>
void dequantize_to(const DequantizePanels& g) {
  if (g.pairs)
    dequantize<kCodes, Pairs>(g);
  else if (g.rounded)
    dequantize<kCodes, RoundedFloats>(g);
  else
    dequantize<kCodes, Floats>(g);
}

float value_at(const QuantizedLayout& layout, const std::uint8_t* group, std::int64_t row, std::int64_t k) {
  const std::uint8_t* line = group + QuantizedLayout::kParameterBytes + row;
  const int code = layout.codes == Codes::kInt8 ? line[k * kPanel] : line[k / 2 * kPanel] >> (k % 2 * 4) & 15;
  if (layout.codes == Codes::kNf4) return kNf4Levels[code] * reinterpret_cast<const float*>(group)[row];
  const auto* parameters = reinterpret_cast<const bfloat16*>(group);
  return to_float(parameters[kPanel + row]) + static_cast<float>(code) * to_float(parameters[row]);
}

template <class To>
void gather(const GatherQuantizedRows& g) {
  for (std::int64_t i = 0; i < g.count; ++i) {
    const std::int64_t id = g.ids[i];
    const std::uint8_t* panel = g.packed + id / kPanel * g.layout.panel_bytes();
    To* y = static_cast<To*>(g.y) + i * g.y_stride;
    for (std::int64_t k = 0; k < g.layout.k; ++k) {
      const std::int64_t index = k / g.layout.group;
      const float value =
          value_at(g.layout, panel + index * g.layout.group_bytes(), id % kPanel, k - index * g.layout.group);
      y[k] = from_float<To>(g.rounded ? to_float(to_bfloat16(value)) : value);
    }
  }
}

void quantize_panels(const QuantizePanels& g) {
  if (g.from == Element::kFloat32)
    quantize_from<float>(g);
  else if (g.from == Element::kBFloat16)
    quantize_from<bfloat16>(g);
  else
    quantize_from<float16>(g);
}

void dequantize_panels(const DequantizePanels& g) {
  if (g.layout.codes == Codes::kInt8)
    dequantize_to<Codes::kInt8>(g);
  else if (g.layout.codes == Codes::kInt4)
    dequantize_to<Codes::kInt4>(g);
  else
    dequantize_to<Codes::kNf4>(g);
}

void gather_quantized_rows(const GatherQuantizedRows& g) {
  g.to == Element::kFloat32 ? gather<float>(g) : gather<bfloat16>(g);
}

}  // namespace

const QuantizedKernels& quantized_kernels() {
  static constexpr QuantizedKernels kTable{.tile_rows = kRowsDecoded,
                                           .quantize_panels = quantize_panels,
                                           .dequantize_panels = dequantize_panels,
                                           .gather_rows = gather_quantized_rows,
                                           .multiply = multiply_quantized};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
