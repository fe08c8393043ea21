#include "ops/scatter.h"

#include "ops/require.h"

namespace flexcore {

void check(const ZeroArgs& args) { require(args.y.contiguous(), "zero: y ", args.y.describe(), " is not contiguous"); }

void check(const ScatterRowsArgs& args) {
  require(args.x.ndim() == 2 && args.y.ndim() == 2 && args.x.shape(1) == args.y.shape(1), "scatter_rows: x ",
          args.x.describe(), " and y ", args.y.describe(), ", wanted [count, width] and [rows, width]");
  require(args.x.dtype() == DType::kFloat32 && args.y.dtype() == DType::kFloat32, "scatter_rows: wanted float32");
  require(args.index.dtype() == DType::kInt32 && args.index.ndim() == 1 && args.index.shape(0) == args.x.shape(0),
          "scatter_rows: index ", args.index.describe(), ", wanted int32 [", args.x.shape(0), "]");
}

void check(const SaveRowsArgs& args) {
  constexpr auto op = SaveRowsArgs::kName;
  require_matrix(op, "x", args.x);
  require(args.dtype == DType::kFloat32 || args.dtype == DType::kBFloat16, op, ": wanted float32 or bfloat16 stores");
  for (const auto& s : args.spans) {
    require(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= args.x.shape(0), op, ": span of rows [",
            s.row_begin, ", ", s.row_end, "), wanted rows of [0, ", args.x.shape(0), ")");
    if (s.row_begin == s.row_end) continue;
    require(s.store != nullptr && s.position >= 0 && s.position + s.row_end - s.row_begin <= s.length, op, ": ",
            s.row_end - s.row_begin, " rows at position ", s.position, " of a store of ", s.length, " tokens");
  }
}

}  // namespace flexcore
