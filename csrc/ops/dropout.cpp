#include "ops/dropout.h"

#include <limits>

#include "ops/require.h"

namespace flexcore {

void check(const DropoutArgs& args) {
  constexpr auto op = DropoutArgs::kName;
  require_matrix(op, "x", args.x);
  require_matrix(op, "y", args.y, args.x.shape(0), args.x.shape(1));
  require(args.mask.p >= 0.0 && args.mask.p < 1.0, op, ": p is ", args.mask.p, ", wanted in [0, 1)");
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(args.position >= 0 && args.position <= kMost - args.x.shape(0), op, ": position is ", args.position,
          ", wanted 0 to ", kMost - args.x.shape(0));
}

}  // namespace flexcore
