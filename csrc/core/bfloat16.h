#pragma once

#include <cstdint>

namespace flexcore {

// Always inlined: these are used in files compiled for several instruction sets, and a shared out-of-line copy would
// mix them.
#define FLEXCORE_INLINE inline __attribute__((always_inline))

/// Storage type; arithmetic is done in float.
struct bfloat16 {
  std::uint16_t bits;
};

FLEXCORE_INLINE float to_float(float x) { return x; }
FLEXCORE_INLINE float to_float(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

/// Round to nearest, ties to even; NaN stays NaN.
FLEXCORE_INLINE bfloat16 to_bfloat16(float x) {
  const auto u = __builtin_bit_cast(std::uint32_t, x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40u : rounded)};
}

template <class T>
T from_float(float x);
template <>
FLEXCORE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FLEXCORE_INLINE bfloat16 from_float<bfloat16>(float x) {
  return to_bfloat16(x);
}

}  // namespace flexcore
