#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// Output features of one panel of a packed weight. A weight [n, k] is stored as panels of 16 rows, zero-padded:
/// float32 [n / 16][k][16], bfloat16 [n / 16][k / 2][16][2]. One line of 64 bytes holds one k (or one pair of them) of
/// a panel, so the same bytes serve products over k, products over n (after a transpose in registers) and row look-up.
inline constexpr std::int64_t kPanelRows = 16;

struct SgemmArgs;  // sgemm.h

enum class Element : std::uint8_t { kFloat32, kBFloat16, kFloat16 };

/// Row-major rows -> panels [begin, end) of the packed layout. `packed` is the address of panel `begin`.
struct PackPanels {
  const void* source = nullptr;  // [rows, k]
  Element from = Element::kFloat32;
  std::int64_t stride = 0;  // elements between rows
  std::int64_t rows = 0, k = 0;
  std::int64_t begin = 0, end = 0;
  Element to = Element::kFloat32;  // kFloat32 or kBFloat16
  void* packed = nullptr;
};

/// Rows -> the left operand of `multiply`: rounded to the weight's dtype, then kept so (`pairs`) or as
/// float32; zeros up to `padded_k`.
struct ConvertRows {
  const void* x = nullptr;  // [rows, k] kFloat32 or kBFloat16
  Element from = Element::kFloat32;
  std::int64_t stride = 0;
  std::int64_t rows = 0, k = 0, padded_k = 0;
  Element weight = Element::kFloat32;
  void* out = nullptr;  // [rows, padded_k]
};

/// Panels over n -> panels over k, for dx = dy W: rows [n_begin, n_end) and panels [k_begin, k_end) (in units of 16 k)
/// of W become float32 [k_end - k_begin][n][16], or bfloat16 [..][n / 2][16][2] from a bfloat16 weight with `pairs`.
struct TransposePanels {
  const void* packed = nullptr;  // the whole weight
  Element weight = Element::kFloat32;
  std::int64_t k = 0;
  std::int64_t n_begin = 0, n_end = 0;  // multiples of 16
  std::int64_t k_begin = 0, k_end = 0;
  void* out = nullptr;
};

/// Lines of bfloat16 pairs -> twice as many lines of floats, k ascending.
struct WidenLines {
  const void* packed = nullptr;  // [lines][16][2] bfloat16
  std::int64_t lines = 0;
  float* out = nullptr;  // [2 * lines][16]
};

/// y[i] = row ids[i] of a weight.
struct GatherWeightRows {
  const void* weight = nullptr;
  Element from = Element::kFloat32;
  bool packed = false;  // row-major otherwise
  std::int64_t k = 0;
  const std::int32_t* ids = nullptr;
  std::int64_t count = 0;
  void* y = nullptr;
  Element to = Element::kFloat32;
  std::int64_t y_stride = 0;
};

/// y (+)= a b + bias over a range of k; the ranges of one product run in ascending order with the same `partial`.
struct GemmBlock {
  const void* a = nullptr;  // [rows, k], from ConvertRows
  std::int64_t a_stride = 0;
  std::int64_t rows = 0;
  const void* b = nullptr;   // panels, each k x 16
  std::int64_t b_panel = 0;  // elements from a panel to the next
  std::int64_t panels = 0;
  std::int64_t k = 0;        // even for pairs
  bool in_cache = false;     // b was just written: behind it is nothing to fetch, perhaps not even memory
  std::int64_t group = 0;    // k that share parameters, where the panels are quantised
  float* partial = nullptr;  // [rows, panels * 16]: the accumulators between two ranges; unused when first and last
  bool first = true, last = true;
  void* y = nullptr;  // [rows, columns]; the fields from here on matter to the last range
  Element to = Element::kFloat32;
  std::int64_t y_stride = 0, columns = 0;
  const float* bias = nullptr;  // [columns] or null
  bool accumulate = false;
};

struct GemmKernels {
  int tile_rows;  // rows of the largest register tile
  /// Whether bfloat16 is multiplied as pairs of k. Otherwise `a` is float32 and only b is bfloat16, widened on the way.
  bool pairs;
  void (*pack_panels)(const PackPanels&);
  void (*convert_rows)(const ConvertRows&);
  void (*transpose_panels)(const TransposePanels&);
  void (*widen_lines)(const WidenLines&);
  void (*gather_rows)(const GatherWeightRows&);
  void (*multiply_float32)(const GemmBlock&);   // panels of floats
  void (*multiply_bfloat16)(const GemmBlock&);  // panels of bfloat16 pairs
  void (*sgemm)(const SgemmArgs&);              // row-major float32, what other kernels call; here for its test
};

FLEXCORE_KERNEL_TABLE(GemmKernels, gemm_kernels)

}  // namespace flexcore::cpu
