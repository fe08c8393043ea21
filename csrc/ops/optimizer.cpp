#include "ops/optimizer.h"

#include "ops/require.h"

namespace flexcore {

void check(const SumSquaresArgs& args) {
  constexpr auto op = SumSquaresArgs::kName;
  require(args.result != nullptr, op, ": result is null");
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    const auto& t = args.tensors[i];
    require(t.dtype() == DType::kFloat32 && t.contiguous(), op, ": tensor ", i, " is ", t,
            ", wanted contiguous float32");
  }
}

void check(const AdamWArgs& args) {
  constexpr auto op = AdamWArgs::kName;
  require(args.step >= 1, op, ": step is ", args.step, ", wanted >= 1");
  require(0 <= args.beta1 && args.beta1 < 1, op, ": beta1 is ", args.beta1, ", wanted in [0, 1)");
  require(0 <= args.beta2 && args.beta2 < 1, op, ": beta2 is ", args.beta2, ", wanted in [0, 1)");
  require(args.eps >= 0, op, ": eps is ", args.eps, ", wanted >= 0");
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    const auto& t = args.tensors[i];
    require(t.size >= 0, op, ": tensor ", i, " has size ", t.size, ", wanted >= 0");
    require(t.size == 0 || (t.param && t.grad && t.exp_avg && t.exp_avg_sq), op, ": tensor ", i,
            " has a null param, grad, exp_avg or exp_avg_sq");
  }
}

void check(const SgdArgs& args) {
  constexpr auto op = SgdArgs::kName;
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    const auto& t = args.tensors[i];
    require(t.size >= 0, op, ": tensor ", i, " has size ", t.size, ", wanted >= 0");
    require(t.size == 0 || (t.param && t.grad), op, ": tensor ", i, " has a null param or grad");
  }
}

}  // namespace flexcore
