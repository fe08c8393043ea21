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
  require(args.dtype == DType::kFloat32 || args.dtype == DType::kBFloat16 || args.dtype == DType::kUInt8, op,
          ": wanted float32, bfloat16 or uint8 stores");
  for (const auto& s : args.spans) {
    require(0 <= s.row_begin && s.row_begin <= s.row_end && s.row_end <= args.x.shape(0), op, ": span of rows [",
            s.row_begin, ", ", s.row_end, "), wanted rows of [0, ", args.x.shape(0), ")");
    if (s.row_begin == s.row_end) continue;
    require(s.store != nullptr && s.position >= 0 && s.position + s.row_end - s.row_begin <= s.length, op, ": ",
            s.row_end - s.row_begin, " rows at position ", s.position, " of a store of ", s.length, " tokens");
  }
}

std::int64_t kept_row_bytes(DType dtype, std::int64_t width) {
  if (dtype != DType::kUInt8) return width * static_cast<std::int64_t>(dtype_size(dtype));
  return (width + 4 * ((width + kGroupWidth - 1) / kGroupWidth) + 15) / 16 * 16;
}

void check(const LoadRowsArgs& args) {
  constexpr auto op = LoadRowsArgs::kName;
  require_matrix(op, "y", args.y);
  require_shape(op, "x", args.x, {args.y.shape(0), kept_row_bytes(DType::kUInt8, args.y.shape(1))});
  require_dtype(op, "x", args.x, DType::kUInt8);
}

}  // namespace flexcore
