#pragma once

#include <cstdint>

#include "backends/cpu/kernels/gemm.h"

namespace flexcore::cpu {

/// Most k that share parameters, ops/weight.h's kMostGroupSize: bounds the buffers of a group.
inline constexpr std::int64_t kMostGroup = 4096;

/// What a code stands for: min + code * scale, or a level of nf4 times absmax.
enum class Codes : std::uint8_t { kInt8, kInt4, kNf4 };

/// A quantised weight [n, k] as panels of kPanelRows rows. A panel is its groups along k, one after the other: a line
/// of 64 bytes of parameters (bfloat16 scale[16], min[16]; nf4: float32 absmax[16]), then a byte a row for every pair
/// of k (the even k in the low four bits) or for every k (int8), zeros for an odd last one.
struct QuantizedLayout {
  Codes codes = Codes::kInt4;
  std::int64_t group = 64;  // k that share parameters; even
  std::int64_t k = 0;

  static constexpr std::int64_t kParameterBytes = 64;
  std::int64_t pair_bytes() const { return codes == Codes::kInt8 ? 2 * kPanelRows : kPanelRows; }  // of two k
  std::int64_t group_bytes() const { return kParameterBytes + group / 2 * pair_bytes(); }
  std::int64_t groups() const { return (k + group - 1) / group; }
  /// A whole number of cache lines.
  std::int64_t panel_bytes() const {
    const std::int64_t bytes = groups() * kParameterBytes + (k + 1) / 2 * pair_bytes();
    return (bytes + 63) / 64 * 64;
  }
};

/// Row-major rows -> panels [begin, end). `packed` is the address of panel `begin`.
struct QuantizePanels {
  QuantizedLayout layout;
  const void* source = nullptr;  // [rows, layout.k]
  Element from = Element::kFloat32;
  std::int64_t stride = 0;  // elements between rows
  std::int64_t rows = 0;
  std::int64_t begin = 0, end = 0;
  std::uint8_t* packed = nullptr;
};

/// A range of k of some panels -> what `multiply` and `transpose_panels` read: panels of floats [k][16], or of bfloat16
/// pairs [k / 2][16][2], even where k is not.
struct DequantizePanels {
  QuantizedLayout layout;
  const std::uint8_t* packed = nullptr;  // of the first panel
  std::int64_t panels = 0;
  std::int64_t begin = 0, end = 0;  // k; begin is even
  bool rounded = false;             // floats: to bfloat16
  bool pairs = false;               // bfloat16 pairs
  void* out = nullptr;
  std::int64_t out_panel = 0;  // elements from a panel to the next; at least (end - begin) * 16, k rounded up to even
};

/// y[i] = row ids[i] of a quantised weight.
struct GatherQuantizedRows {
  QuantizedLayout layout;
  const std::uint8_t* packed = nullptr;
  bool rounded = false;  // to bfloat16, before the conversion to y's dtype
  const std::int32_t* ids = nullptr;
  std::int64_t count = 0;
  void* y = nullptr;
  Element to = Element::kFloat32;
  std::int64_t y_stride = 0;
};

struct QuantizedKernels {
  int tile_rows;  // most rows of multiply
  void (*quantize_panels)(const QuantizePanels&);
  void (*dequantize_panels)(const DequantizePanels&);
  void (*gather_rows)(const GatherQuantizedRows&);
  /// A GemmBlock whose b are quantised panels, with their bytes between them, over all of k; `rounded`: to bfloat16.
  void (*multiply)(const GemmBlock&, Codes, bool rounded);
};

FLEXCORE_KERNEL_TABLE(QuantizedKernels, quantized_kernels)

}  // namespace flexcore::cpu
