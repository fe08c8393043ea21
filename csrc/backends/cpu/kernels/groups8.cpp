#include "backends/cpu/kernels/groups8.h"

#include "backends/cpu/kernels/row_lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

constexpr std::int64_t kVecs = kCodeGroup / kLanes;

typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef std::uint8_t LooseBytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

/// The bfloat16 next to a float, away from zero or not.
FLEXCORE_INLINE std::uint16_t truncated(float x) {
  return static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, x) >> 16);
}
FLEXCORE_INLINE std::uint16_t enlarged(float x) {
  return static_cast<std::uint16_t>((__builtin_bit_cast(std::uint32_t, x) + 0xffffu) >> 16);
}
FLEXCORE_INLINE float widened(std::uint16_t x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x) << 16);
}
FLEXCORE_INLINE std::uint16_t rounded_down(float x) { return x < 0.0f ? enlarged(x) : truncated(x); }

FLEXCORE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
FLEXCORE_INLINE float reduce_min(Vec v) { return -reduce_max(-v); }

// What a group's codes and a pair at the end of the row stand for. A number that is not finite makes all of them NaN.
FLEXCORE_INLINE void encode(const float* x, std::uint8_t* codes, std::int64_t count, std::uint8_t* pair) {
  Vec low = load(x), high = low, sum = low * 0.0f;
#pragma GCC unroll 16
  for (std::int64_t i = 1; i < kVecs; ++i) {
    const Vec v = load(x + i * kLanes);
    low = min(low, v), high = max(high, v), sum += v * 0.0f;
  }
  const float zero = reduce_add(sum);  // NaN, if there is one or infinity
  const std::uint16_t minimum = rounded_down(reduce_min(low));
  const float base = widened(minimum);
  const std::uint16_t step = zero == zero ? enlarged((reduce_max(high) - base) * (1.0f / 255.0f)) : 0x7fc0;
  const float size = widened(step), inverse = size > 0.0f ? 1.0f / size : 0.0f;
  alignas(64) std::uint8_t made[kCodeGroup];
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kVecs; ++i) {
    Vec scaled = (load(x + i * kLanes) - base) * inverse + 0.5f;
    scaled = scaled < 255.0f ? scaled : Vec{} + 255.0f;
    scaled = scaled > 0.0f ? scaled : Vec{};
    *reinterpret_cast<Bytes*>(made + i * kLanes) =
        __builtin_convertvector(__builtin_convertvector(scaled, VecI), Bytes);
  }
  if (count == kCodeGroup)
    __builtin_memcpy(codes, made, kCodeGroup);
  else
    for (std::int64_t i = 0; i < count; ++i) codes[i] = made[i];
  __builtin_memcpy(pair, &minimum, 2);
  __builtin_memcpy(pair + 2, &step, 2);
}

template <class X>
void quantize(const QuantizeRows& t, std::int64_t begin, std::int64_t end) {
  alignas(64) float group[kCodeGroup];
  for (std::int64_t i = begin; i < end; ++i) {
    const X* x = row<X>(t.x, i);
    std::uint8_t *codes = t.codes + i * t.stride, *pair = codes + t.width;
    for (std::int64_t column = 0; column < t.width; column += kCodeGroup, pair += 4) {
      const std::int64_t count = t.width - column < kCodeGroup ? t.width - column : kCodeGroup;
      sweep(column, column + count, [&](auto block) { store(group + (block.i - column), block.get(x)); });
      for (std::int64_t j = count; j < kCodeGroup; ++j) group[j] = group[0];
      encode(group, codes + column, count, pair);
    }
  }
}

template <class Y>
void dequantize(const DequantizeRows& t, std::int64_t begin, std::int64_t end) {
  alignas(64) std::uint8_t group[kCodeGroup];
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint8_t *codes = t.codes + i * t.stride, *pair = codes + t.width;
    Y* y = row<Y>(t.y, i);
    for (std::int64_t column = 0; column < t.width; column += kCodeGroup, pair += 4) {
      const std::int64_t count = t.width - column < kCodeGroup ? t.width - column : kCodeGroup;
      std::uint16_t minimum, step;
      __builtin_memcpy(&minimum, pair, 2);
      __builtin_memcpy(&step, pair + 2, 2);
      const float base = widened(minimum), size = widened(step);
      const std::uint8_t* from = codes + column;
      if (count < kCodeGroup) {
        for (std::int64_t j = 0; j < count; ++j) group[j] = from[j];
        from = group;
      }
      sweep(column, column + count, [&](auto block) {
        const Bytes bytes = *reinterpret_cast<const LooseBytes*>(from + (block.i - column));
        block.put(y, base + size * __builtin_convertvector(__builtin_convertvector(bytes, VecI), Vec));
      });
    }
  }
}

}  // namespace

const Groups8Kernels& groups8_kernels() {
  static constexpr Groups8Kernels kTable = {{quantize<float>, quantize<bfloat16>},
                                            {dequantize<float>, dequantize<bfloat16>}};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
