#include "ops/rotary.h"

#include "ops/require.h"

namespace flexcore {

void check(const RotaryArgs& args) {
  constexpr auto op = RotaryArgs::kName;
  const auto& x = args.x;
  require(x.ndim() == 3, op, ": x is ", x, ", wanted [num_tokens, num_heads, head_dim]");
  require_shape(op, "x", x, {x.shape(0), x.shape(1), x.shape(2)});
  require_shape(op, "y", args.y, {x.shape(0), x.shape(1), x.shape(2)});
  require_float_rows(op, "x", x);
  require_float_rows(op, "y", args.y);
  require(x.shape(2) % 2 == 0, op, ": head_dim is ", x.shape(2), ", wanted an even number");
  require_vector(op, "positions", args.positions, x.shape(0), DType::kInt32);
  const auto max_positions = args.cos.ndim() == 2 ? args.cos.shape(0) : 0;
  for (const auto& [name, table] : {std::pair{"cos", &args.cos}, std::pair{"sin", &args.sin}}) {
    require_shape(op, name, *table, {max_positions, x.shape(2) / 2});
    require_dtype(op, name, *table, DType::kFloat32);
    require_contiguous(op, name, *table);
  }
}

}  // namespace flexcore
