#include "ops/cross_entropy.h"

#include "ops/require.h"

namespace flexcore {

void check(const LinearCrossEntropyArgs& args) {
  constexpr auto op = LinearCrossEntropyArgs::kName;
  require_weight(op, "weight", args.weight);
  require(!args.weight.format.quantized(), op, ": weight is quantised, wanted a dense one");
  const auto rows = args.hidden.ndim() == 2 ? args.hidden.shape(0) : 0;
  require_matrix(op, "hidden", args.hidden, rows, args.weight.in_features);
  require_vector(op, "labels", args.labels, rows, DType::kInt32);
  require_vector(op, "loss", args.loss, rows);
  if (!args.grad_hidden) return;
  require_matrix(op, "grad_hidden", args.grad_hidden, rows, args.weight.in_features);
  require_vector(op, "grad_scale", args.grad_scale, rows);
}

}  // namespace flexcore
