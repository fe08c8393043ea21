#include "ops/product.h"

#include "ops/require.h"

namespace flexcore {

void check(const ProductArgs& args) {
  constexpr auto op = ProductArgs::kName;
  require_matrix(op, "a", args.a);
  require_matrix(op, "b", args.b);
  require(args.b.shape(args.transpose_b ? 1 : 0) == args.depth(), op, ": b is ", args.b, ", wanted ", args.depth(),
          args.transpose_b ? " columns" : " rows");
  require_matrix(op, "c", args.c, args.rows(), args.columns());
  require_dtype(op, "a", args.a, DType::kFloat32);
  require_dtype(op, "b", args.b, DType::kFloat32);
  require_dtype(op, "c", args.c, DType::kFloat32);
}

}  // namespace flexcore
