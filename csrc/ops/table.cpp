#include "ops/table.h"

#include "ops/require.h"

namespace flexcore {

namespace {

void require_table(std::string_view op, const TokenTable& table, const TensorView& token_ids, std::string_view name,
                   const TensorView& rows) {
  require(table.num_tokens > 0 && table.width > 0 && table.data != nullptr, op, ": table is [", table.num_tokens, ", ",
          table.width, "]", table.data == nullptr ? " without memory" : ", wanted at least one element");
  const std::int64_t count = rows.ndim() == 2 ? rows.shape(0) : 0;
  require_matrix(op, name, rows, count, table.width);
  require_dtype(op, name, rows, DType::kFloat32);
  require_vector(op, "token_ids", token_ids, count, DType::kInt32);
}

}  // namespace

void check(const TableLookUpArgs& args) { require_table(args.kName, args.table, args.token_ids, "y", args.y); }
void check(const TableAddArgs& args) { require_table(args.kName, args.table, args.token_ids, "x", args.x); }

}  // namespace flexcore
