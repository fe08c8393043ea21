#include "ops/silu_mul.h"

#include "ops/require.h"

namespace flexcore {

namespace {

void require_up(std::string_view op, const TensorView& gate, const TensorView& up) {
  require_matrix(op, "up", up, gate.shape(0), gate.shape(1));
  require(up.dtype() == gate.dtype(), op, ": up is ", up, ", gate is ", gate, ", wanted one dtype");
}

}  // namespace

void check(const SiluMulArgs& args) {
  constexpr auto op = SiluMulArgs::kName;
  require_matrix(op, "gate", args.gate);
  require_up(op, args.gate, args.up);
  require_matrix(op, "y", args.y, args.gate.shape(0), args.gate.shape(1));
}

void check(const SiluMulBackwardArgs& args) {
  constexpr auto op = SiluMulBackwardArgs::kName;
  require_matrix(op, "gate", args.gate);
  const auto rows = args.gate.shape(0), width = args.gate.shape(1);
  require_up(op, args.gate, args.up);
  require_matrix(op, "grad_y", args.grad_y, rows, width);
  if (args.grad_gate) require_matrix(op, "grad_gate", args.grad_gate, rows, width);
  if (args.grad_up) require_matrix(op, "grad_up", args.grad_up, rows, width);
}

}  // namespace flexcore
