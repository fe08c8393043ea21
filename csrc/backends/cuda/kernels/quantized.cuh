#pragma once

#include "backends/cuda/kernels/pack.cuh"

// Frozen weights as codes of 8 or 4 bits (ops/weight.h). A row is whole by itself, so that neighbours in memory are one
// matrix: its codes in ascending k (of 4 bits the even k in the low half of a byte), zeros up to a multiple of 16
// bytes, then 4 bytes for each group: bfloat16 scale and minimum, or nf4's float32 absmax; again up to a multiple
// of 16.

namespace flexcore::cuda {

enum class Codes : std::uint8_t { kInt8, kInt4, kNf4 };

struct QuantizedRows {
  std::uint8_t* data = nullptr;
  std::int64_t row_bytes = 0, parameters = 0;  // where a row's parameters begin
  std::int64_t columns = 0;
  unsigned group = 64;
  bool rounded = false;  // values are bfloat16

  static constexpr std::int64_t up16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }
  static QuantizedRows layout(Codes codes, std::int64_t columns, std::int64_t group, bool rounded) {
    const std::int64_t parameters = up16(codes == Codes::kInt8 ? columns : (columns + 1) / 2);
    const std::int64_t groups = (columns + group - 1) / group;
    return {nullptr, parameters + up16(4 * groups), parameters, columns, static_cast<unsigned>(group), rounded};
  }
  __device__ __forceinline__ unsigned parameters_of(std::int64_t row, std::int64_t column) const {
    const unsigned index = static_cast<unsigned>(column) / group;
    return *reinterpret_cast<const unsigned*>(data + row * row_bytes + parameters + 4 * index);
  }
};

/// Levels of nf4 (QLoRA, arXiv 2305.14314, appendix E), by thread for a table in shared memory.
__device__ __forceinline__ float nf4_level(int code) {
  float level = -1.0f;  // selected: an indexed table would be local memory
  level = code == 1 ? -0.6961928009986877f : level;
  level = code == 2 ? -0.5250730514526367f : level;
  level = code == 3 ? -0.39491748809814453f : level;
  level = code == 4 ? -0.28444138169288635f : level;
  level = code == 5 ? -0.18477343022823334f : level;
  level = code == 6 ? -0.09105003625154495f : level;
  level = code == 7 ? 0.0f : level;
  level = code == 8 ? 0.07958029955625534f : level;
  level = code == 9 ? 0.16093020141124725f : level;
  level = code == 10 ? 0.24611230194568634f : level;
  level = code == 11 ? 0.33791524171829224f : level;
  level = code == 12 ? 0.44070982933044434f : level;
  level = code == 13 ? 0.5626170039176941f : level;
  level = code == 14 ? 0.7229568362236023f : level;
  level = code == 15 ? 1.0f : level;
  return level;
}

inline constexpr std::size_t kLevelBytes = 16 * sizeof(float);

/// The table, for all threads of a block; whoever reads it must have come through here.
__device__ __forceinline__ const float* make_levels(unsigned char* shared) {
  auto* levels = reinterpret_cast<float*>(shared);
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(static_cast<int>(threadIdx.x));
  __syncthreads();
  return levels;
}

/// What a code is worth; `parameters` are its group's. An integer below 256 is exact, and so is its product with the
/// scale: a fused addition of the minimum has the same bits as one of its own.
template <Codes kCodes>
__device__ __forceinline__ float decode(unsigned code, unsigned parameters, const float* levels) {
  if constexpr (kCodes == Codes::kNf4) {
    return levels[code] * __uint_as_float(parameters);
  } else {
    const float number = __uint_as_float(code | 0x4b000000u) - 8388608.0f;  // the code in the last bits of 2^23
    return fmaf(number, __uint_as_float(parameters << 16), __uint_as_float(parameters & 0xffff0000u));
  }
}

/// 8 codes that begin at a multiple of 8: of one group. `low` and `high` are their bytes (of 4 bits `low` alone).
template <Codes kCodes>
__device__ __forceinline__ void decode8(unsigned low, unsigned high, unsigned parameters, const float* levels,
                                        bool rounded, float (&w)[8]) {
  FLEXCORE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const unsigned code = kCodes == Codes::kInt8 ? (i < 4 ? low : high) >> 8 * (i % 4) & 255u : low >> 4 * i & 15u;
    w[i] = decode<kCodes>(code, parameters, levels);
  }
  if (!rounded) return;
  FLEXCORE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    const unsigned pair = pack_bf16(w[i], w[i + 1]);
    w[i] = __uint_as_float(pair << 16);
    w[i + 1] = __uint_as_float(pair & 0xffff0000u);
  }
}

/// Rows as they are, or those that `index` names; one that is not there becomes NaN.
struct Dequantize {
  QuantizedRows w;
  Rows y;
  const std::int32_t* index;
  std::int64_t num_rows;  // of w, when there is an index
};

/// A thread makes 8 neighbours, in one store where `packs` says that y allows it.
template <Codes kCodes>
__global__ void __launch_bounds__(128) dequantize_kernel(const Dequantize a, bool packs) {
  FLEXCORE_SHARED(shared);
  const float* levels = make_levels(shared);
  const std::int64_t row = blockIdx.x;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * 8;
  if (column >= a.w.columns) return;
  const std::int64_t from = a.index == nullptr ? row : a.index[row];
  float w[8];
  if (a.index != nullptr && (from < 0 || from >= a.num_rows)) {
    FLEXCORE_UNROLL
    for (int i = 0; i < 8; ++i) w[i] = __int_as_float(0x7fc00000);
  } else {
    const std::uint8_t* codes = a.w.data + from * a.w.row_bytes + (kCodes == Codes::kInt8 ? column : column / 2);
    const unsigned low = *reinterpret_cast<const unsigned*>(codes);
    const unsigned high = kCodes == Codes::kInt8 ? *reinterpret_cast<const unsigned*>(codes + 4) : 0u;
    decode8<kCodes>(low, high, a.w.parameters_of(from, column), levels, a.w.rounded, w);
  }
  if (packs) {
    a.y.store<8>(row, column, w);
    return;
  }
  FLEXCORE_UNROLL
  for (int i = 0; i < 8; ++i) {
    const float one[1] = {w[i]};
    if (column + i < a.w.columns) a.y.store<1>(row, column + i, one);
  }
}

/// y (+)= x w^T + bias for at most kRows rows.
struct QuantizedProduct {
  Rows x;  // [rows, columns of w]
  QuantizedRows w;
  Rows y;     // [rows, outputs]
  Rows bias;  // one row, if it has data
  std::int64_t rows, outputs;
  bool packs;  // x can be read in packs
  bool accumulate;
};

inline constexpr int kFewRowsWarps = 4;
/// Outputs of a warp: its lanes' parts of x serve as many.
inline constexpr int kFewRowsOutputs = 4;

/// A warp computes kFewRowsOutputs outputs for all rows; codes are read once, 16 bytes a lane at a time. Sums of a lane
/// are in ascending k, those of lanes in a tree: the same for every row, wherever it is.
template <Codes kCodes, int kRows>
__global__ void __launch_bounds__(kFewRowsWarps* kWarpSize) quantized_rows_kernel(const QuantizedProduct p) {
  constexpr int kOutputs = kFewRowsOutputs, kPart = kCodes == Codes::kInt8 ? 16 : 32;  // codes in 16 bytes
  FLEXCORE_SHARED(shared);
  const float* levels = make_levels(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kFewRowsWarps + warp) * kOutputs;
  if (first >= p.outputs) return;  // whole warps
  float sums[kRows][kOutputs] = {};
  for (std::int64_t begin = lane * kPart; begin < p.w.columns; begin += kWarpSize * kPart) {
    Pack<unsigned, 4> codes[kOutputs];
    FLEXCORE_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      const std::int64_t row = first + o < p.outputs ? first + o : p.outputs - 1;
      codes[o] = load_pack<unsigned, 4>(reinterpret_cast<const unsigned*>(
          p.w.data + row * p.w.row_bytes + (kCodes == Codes::kInt8 ? begin : begin / 2)));
    }
    FLEXCORE_UNROLL
    for (int part = 0; part < kPart / 8; ++part) {
      const std::int64_t column = begin + 8 * part;
      if (column >= p.w.columns) break;
      float w[kOutputs][8];
      FLEXCORE_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const std::int64_t row = first + o < p.outputs ? first + o : p.outputs - 1;
        const unsigned low = codes[o].at[kCodes == Codes::kInt8 ? 2 * part : part];
        const unsigned high = codes[o].at[kCodes == Codes::kInt8 ? 2 * part + 1 : part];
        decode8<kCodes>(low, high, p.w.parameters_of(row, column), levels, p.w.rounded, w[o]);
      }
      FLEXCORE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t row = r < p.rows ? r : p.rows - 1;
        float x[8];
        if (p.packs) {
          p.x.load<8>(row, column, x);
        } else {
          FLEXCORE_UNROLL
          for (int i = 0; i < 8; ++i) {
            float one[1] = {0.0f};
            if (column + i < p.w.columns) p.x.load<1>(row, column + i, one);
            x[i] = one[0];
          }
        }
        FLEXCORE_UNROLL
        for (int o = 0; o < kOutputs; ++o) {
          FLEXCORE_UNROLL
          for (int i = 0; i < 8; ++i) sums[r][o] = fmaf(x[i], w[o][i], sums[r][o]);
        }
      }
    }
  }
  FLEXCORE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FLEXCORE_UNROLL
    for (int o = 0; o < kOutputs; ++o) {
      float sum[1] = {warp_sum(sums[r][o])};
      if (lane != 0 || r >= p.rows || first + o >= p.outputs) continue;
      float other[1];
      if (p.bias.data != nullptr) {
        p.bias.load<1>(0, first + o, other);
        sum[0] += other[0];
      }
      if (p.accumulate) {
        p.y.load<1>(r, first + o, other);
        sum[0] += other[0];
      }
      p.y.store<1>(r, first + o, sum);
    }
  }
}

/// float32, bfloat16 or float16, as they lie in a checkpoint.
enum class SourceType : std::uint8_t { kFloat32, kBFloat16, kFloat16 };

struct Quantize {
  const void* source;  // [rows, columns of w], dense
  SourceType from;
  std::int64_t rows;
  QuantizedRows w;

  __device__ __forceinline__ float at(std::int64_t row, std::int64_t column) const {
    const std::int64_t i = row * w.columns + column;
    if (from == SourceType::kFloat32) return static_cast<const float*>(source)[i];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(source)[i];
    return from == SourceType::kBFloat16 ? to_float(bf16{bits}) : half_to_float(bits);
  }
};

/// As on the CPU, to the last bit: minimum and scale are rounded first, and codes are chosen against them.
template <Codes kCodes>
struct Encoder {
  static constexpr float kLevels = kCodes == Codes::kInt8 ? 255.0f : 15.0f;
  static constexpr float kLargest = 3.3895314e38f;  // of bfloat16
  float min, scale;                                 // of nf4 scale alone

  __device__ __forceinline__ unsigned set_range(float low, float high) {
    if constexpr (kCodes == Codes::kNf4) {
      scale = fmaxf(-low, high);
      return __float_as_uint(scale);
    } else {
      const unsigned min_bits = pack_bf16(fminf(fmaxf(low, -kLargest), kLargest), 0.0f) & 0xffffu;
      min = __uint_as_float(min_bits << 16);
      float step = high > min ? (high - min) / kLevels : 0.0f;
      if (step * 1.01f * kLevels > kLargest) step = 0.99f * kLargest / kLevels;
      const unsigned scale_bits = pack_bf16(step, 0.0f) & 0xffffu;
      scale = __uint_as_float(scale_bits << 16);
      return scale_bits | min_bits << 16;
    }
  }
  __device__ __forceinline__ unsigned code(float x, const float* levels) const {
    if constexpr (kCodes == Codes::kNf4) {
      const float q = scale > 0.0f ? x / scale : 0.0f;
      unsigned code = 0;
      FLEXCORE_UNROLL
      for (int i = 0; i < 15; ++i) code += q > 0.5f * (levels[i] + levels[i + 1]) ? 1 : 0;
      return code;
    } else {
      const float q = scale > 0.0f ? (x - min) / scale : 0.0f;
      return static_cast<unsigned>(rintf(fminf(fmaxf(q, 0.0f), kLevels)));
    }
  }
};

/// A warp a group.
template <Codes kCodes>
__global__ void __launch_bounds__(256) quantize_kernel(const Quantize a) {
  FLEXCORE_SHARED(shared);
  const float* levels = make_levels(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarpSize;
  const std::int64_t groups = (a.w.columns + a.w.group - 1) / a.w.group, row = warp / groups, group = warp % groups;
  if (row >= a.rows) return;  // whole warps
  const std::int64_t begin = group * a.w.group;
  const std::int64_t end = begin + a.w.group < a.w.columns ? begin + a.w.group : a.w.columns;
  float low = a.at(row, begin), high = low;
  for (std::int64_t k = begin + lane; k < end; k += kWarpSize) {
    const float x = a.at(row, k);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
  low = -warp_max(-low);
  high = warp_max(high);
  Encoder<kCodes> encoder;
  const unsigned parameters = encoder.set_range(low, high);
  std::uint8_t* out = a.w.data + row * a.w.row_bytes;
  if (lane == 0) *reinterpret_cast<unsigned*>(out + a.w.parameters + 4 * group) = parameters;
  constexpr int kInByte = kCodes == Codes::kInt8 ? 1 : 2;
  // The last group also writes the zeros behind it.
  const std::int64_t last = end == a.w.columns ? a.w.parameters : end / kInByte;
  for (std::int64_t byte = begin / kInByte + lane; byte < last; byte += kWarpSize) {
    unsigned codes = 0;
    FLEXCORE_UNROLL
    for (int i = 0; i < kInByte; ++i)
      if (byte * kInByte + i < end) codes |= encoder.code(a.at(row, byte * kInByte + i), levels) << 4 * i;
    out[byte] = static_cast<std::uint8_t>(codes);
  }
}

}  // namespace flexcore::cuda
