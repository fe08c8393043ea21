#include "ops/scatter.h"

namespace flexcore {

void check(const ZeroArgs& args) { require(args.y.contiguous(), "zero: y ", args.y.describe(), " is not contiguous"); }

void check(const ScatterRowsArgs& args) {
  require(args.x.ndim() == 2 && args.y.ndim() == 2 && args.x.shape(1) == args.y.shape(1), "scatter_rows: x ",
          args.x.describe(), " and y ", args.y.describe(), ", wanted [count, width] and [rows, width]");
  require(args.x.dtype() == DType::kFloat32 && args.y.dtype() == DType::kFloat32, "scatter_rows: wanted float32");
  require(args.index.dtype() == DType::kInt32 && args.index.ndim() == 1 && args.index.shape(0) == args.x.shape(0),
          "scatter_rows: index ", args.index.describe(), ", wanted int32 [", args.x.shape(0), "]");
}

}  // namespace flexcore
