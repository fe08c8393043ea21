#pragma once

#include <cstdint>

#include "core/bfloat16.h"

namespace flexcore::cpu {

// Elementary functions of float, or of any GCC vector of float, without branches, calls or tables: a plain loop over
// them vectorises. Errors are relative, over the whole finite range; NaN gives NaN. Results below 2^-125.5 are flushed
// to zero, so exp(-inf) is exactly 0, and exp(0) is exactly 1.
namespace vec {

template <class V>
struct IntOf {
  using type = decltype(V{} < V{});
};
template <>
struct IntOf<float> {
  using type = std::int32_t;
};
template <class V>
using Int = typename IntOf<V>::type;

template <class V>
struct UnsignedOf {
  typedef std::uint32_t type __attribute__((vector_size(sizeof(V))));
};
template <>
struct UnsignedOf<float> {
  using type = std::uint32_t;
};

template <class V, class I>
FLEXCORE_INLINE V to_float_lanes(I x) {
  if constexpr (sizeof(V) == sizeof(float))
    return static_cast<float>(x);
  else
    return __builtin_convertvector(x, V);
}

/// NaN stays NaN.
template <class V>
FLEXCORE_INLINE V clamp(V x, float lowest, float highest) {
  const V low = V{} + lowest, high = V{} + highest;
  const V raised = low > x ? low : x;
  return high < raised ? high : raised;
}

/// q * 2^(n - 1), n held in the low bits of the shifted sum `t` (see kShift). q is doubled, so that n = 128 needs no
/// special case, and n = -126 gives exactly 0.
template <class V>
FLEXCORE_INLINE V scale_by_power(V q, V t) {
  return q * __builtin_bit_cast(V, (__builtin_bit_cast(typename UnsignedOf<V>::type, t) << 23) + (126u << 23));
}

// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
inline constexpr float kShift = 12582912.0f;

/// 2^x for x up to 129, error 1e-7. Softmax needs no upper bound.
template <class V>
FLEXCORE_INLINE V exp2_bounded(V x) {
  const V low = V{} - 126.0f;
  const V clamped = low > x ? low : x;
  const V t = clamped + kShift;
  const V r = clamped - (t - kShift);
  V q = r * (2 * 0.0001545336197f) + (2 * 0.001339109325f);
  q = q * r + (2 * 0.009618082183f);
  q = q * r + (2 * 0.05550356682f);
  q = q * r + (2 * 0.2402265076f);
  q = q * r + (2 * 0.6931471881f);
  q = q * r + 2.0f;
  return scale_by_power(q, t);
}

/// 2^x, error 1e-7.
template <class V>
FLEXCORE_INLINE V exp2(V x) {
  const V high = V{} + 129.0f;
  return exp2_bounded(high < x ? high : x);
}

/// e^x, error 1e-7.
template <class V>
FLEXCORE_INLINE V exp(V x) {
  const V clamped = clamp(x, -87.3f, 89.5f);
  const V t = clamped * 1.44269504f + kShift;
  const V n = t - kShift;
  // ln 2 in two parts; the first has 9 bits, so its product with n is exact.
  const V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  V q = r * (2 * 0.001392625083f) + (2 * 0.008363232884f);
  q = q * r + (2 * 0.04166655421f);
  q = q * r + (2 * 0.1666657667f);
  q = q * r + 1.0f;
  q = q * r + 2.0f;
  q = q * r + 2.0f;
  return scale_by_power(q, t);
}

/// Natural logarithm, error 1e-7; log(0) and of subnormals: -inf; of negative numbers: NaN.
template <class V>
FLEXCORE_INLINE V log(V x) {
  const auto bits = __builtin_bit_cast(Int<V>, x);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const auto shifted = bits - 0x3f3504f3;
  const auto e = shifted >> 23;
  const V f = __builtin_bit_cast(V, (shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const V n = to_float_lanes<V>(e);
  V q = f * 0.06971611471f - 0.1147973385f;
  q = q * f + 0.1168541992f;
  q = q * f - 0.1242568733f;
  q = q * f + 0.1424905765f;
  q = q * f - 0.1666780232f;
  q = q * f + 0.2000071575f;
  q = q * f - 0.2499999696f;
  q = q * f + 0.3333333118f;
  const V square = f * f;
  const V y = n * 0.693359375f + (f + (square * f * q - (square * 0.5f + n * 2.12194440e-4f)));
  const V special = x < 0.0f ? V{} + __builtin_nanf("") : (x < 1.17549435e-38f ? V{} - __builtin_inff() : x);
  return (x >= 1.17549435e-38f) & (x < __builtin_inff()) ? y : special;
}

/// 1 / (1 + e^-x), error 2e-7.
template <class V>
FLEXCORE_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + vec::exp(-x));
}

/// x * sigmoid(x).
template <class V>
FLEXCORE_INLINE V silu(V x) {
  return x / (1.0f + vec::exp(-x));
}

}  // namespace vec

}  // namespace flexcore::cpu
