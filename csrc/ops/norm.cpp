#include "ops/norm.h"

#include "ops/require.h"

namespace flexcore {

void check(const RmsNormArgs& args) {
  constexpr auto op = RmsNormArgs::kName;
  require_matrix(op, "x", args.x);
  require_matrix(op, "y", args.y, args.x.shape(0), args.x.shape(1));
  require_vector(op, "weight", args.weight, args.x.shape(1));
  require(args.eps >= 0, op, ": eps is ", args.eps, ", wanted >= 0");
}

void check(const RmsNormBackwardArgs& args) {
  constexpr auto op = RmsNormBackwardArgs::kName;
  require_matrix(op, "x", args.x);
  const auto rows = args.x.shape(0), width = args.x.shape(1);
  require_matrix(op, "grad_y", args.grad_y, rows, width);
  require_matrix(op, "grad_x", args.grad_x, rows, width);
  require_vector(op, "weight", args.weight, width);
  require(args.eps >= 0, op, ": eps is ", args.eps, ", wanted >= 0");
}

}  // namespace flexcore
