#pragma once

#include <sstream>
#include <string>

#include "flexcore/error.h"
#include "flexcore/tensor.h"

namespace flexcore {

/// Lets checks pass a tensor itself: its text is made only when the check fails.
inline std::ostream& operator<<(std::ostream& out, const TensorView& tensor) { return out << tensor.describe(); }

/// Joins its arguments with operator<<.
template <class... Ts>
std::string str(const Ts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Throws `E` with the joined message when `condition` is false.
template <class E = InvalidArgument, class... Ts>
void require(bool condition, const Ts&... message) {
  if (!condition) [[unlikely]]
    throw E(str(message...));
}

}  // namespace flexcore
