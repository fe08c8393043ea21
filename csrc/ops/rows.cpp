#include "ops/rows.h"

#include "ops/require.h"

namespace flexcore {

void check(const EmbeddingArgs& args) {
  constexpr auto op = EmbeddingArgs::kName;
  const auto count = args.token_ids.ndim() == 1 ? args.token_ids.shape(0) : 0;
  require_vector(op, "token_ids", args.token_ids, count, DType::kInt32);
  require_weight(op, "weight", args.weight);
  require_matrix(op, "y", args.y, count, args.weight.in_features);
}

void check(const GatherRowsArgs& args) {
  constexpr auto op = GatherRowsArgs::kName;
  const auto count = args.index.ndim() == 1 ? args.index.shape(0) : 0;
  require_vector(op, "index", args.index, count, DType::kInt32);
  require_matrix(op, "x", args.x);
  require_matrix(op, "y", args.y, count, args.x.shape(1));
}

void check(const CopyArgs& args) {
  constexpr auto op = CopyArgs::kName;
  require_matrix(op, "x", args.x);
  require_matrix(op, "y", args.y, args.x.shape(0), args.x.shape(1));
}

}  // namespace flexcore
