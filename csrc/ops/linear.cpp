#include "ops/linear.h"

#include "ops/require.h"

namespace flexcore {

namespace {

void require_in_features(std::string_view op, const WeightView& weight, std::string_view name, const TensorView& t) {
  require_weight(op, "weight", weight);
  require(weight.in_features == t.shape(1), op, ": weight is [", weight.out_features, ", ", weight.in_features, "], ",
          name, " is ", t, ", wanted the same in_features");
}

}  // namespace

void check(const LinearArgs& args) {
  constexpr auto op = LinearArgs::kName;
  require_matrix(op, "x", args.x);
  for (const auto& member : args.members) {
    require_in_features(op, member.weight, "x", args.x);
    require_matrix(op, "y", member.y, args.x.shape(0), member.weight.out_features);
    if (member.bias) require_vector(op, "bias", member.bias, member.weight.out_features);
  }
}

void check(const LinearBackwardArgs& args) {
  constexpr auto op = LinearBackwardArgs::kName;
  require(!args.members.empty(), op, ": members are 0, wanted at least one");
  require_matrix(op, "grad_x", args.grad_x);
  require_dtype(op, "grad_x", args.grad_x, DType::kFloat32);
  for (const auto& member : args.members) {
    require_in_features(op, member.weight, "grad_x", args.grad_x);
    require_matrix(op, "grad_y", member.grad_y, args.grad_x.shape(0), member.weight.out_features);
  }
}

}  // namespace flexcore
