#pragma once

#include <cstdint>

namespace flexcore {

/// Sum of the context lengths of rows [begin, end) of a sequence: row i sees i + 1 tokens.
inline std::int64_t context_sum(std::int64_t begin, std::int64_t end) {
  return (end * (end + 1) - begin * (begin + 1)) / 2;
}

/// Largest count in [1, high] that `holds`, which is true below and false above some point; 0 when there is none.
template <class Predicate>
std::int64_t largest_that(std::int64_t high, Predicate&& holds) {
  if (high <= 0) return 0;
  if (holds(high)) return high;
  std::int64_t low = 0;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (holds(middle) ? low : high) = middle;
  }
  return low;
}

}  // namespace flexcore
