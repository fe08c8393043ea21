#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace flexcore {

/// For n >= 0 and step > 0.
constexpr std::int64_t divide_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step; }
constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) { return divide_up(n, step) * step; }

/// Finite as a float32; NaN is not.
inline bool fits_float(double value) { return std::abs(value) <= std::numeric_limits<float>::max(); }

}  // namespace flexcore
