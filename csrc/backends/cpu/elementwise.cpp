#include "backends/cpu/kernels/elementwise.h"

#include <algorithm>

#include "backends/cpu/families.h"
#include "backends/cpu/rows.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/rows.h"
#include "ops/silu_mul.h"

namespace flexcore::cpu {

namespace {

template <class Args>
void over_rows(OpContext& context, std::int64_t rows, std::int64_t width, ElementwiseKernels::Kernel<Args> kernel,
               const Args& args) {
  if (rows == 0 || width == 0) return;
  context.threads->parallel_for(rows, grain(width),
                                [&](std::int64_t begin, std::int64_t end, int) { kernel(args, begin, end); });
}

void require_indices(std::string_view op, std::string_view name, const TensorView& indices, std::int64_t bound) {
  const auto* values = indices.as<const std::int32_t>();
  for (std::int64_t i = 0; i < indices.size(); ++i)
    require(0 <= values[i] && values[i] < bound, op, ": ", name, "[", i, "] is ", values[i], ", wanted in [0, ", bound,
            ")");
}

void rms_norm(OpContext& context, const RmsNormArgs& args) {
  const auto width = args.x.shape(1);
  over_rows(context, args.x.shape(0), width, elementwise_kernels().rms_norm[type_index(args.x)][type_index(args.y)],
            RmsNormRows{in(args.x), args.weight.as<const float>(), out(args.y), width, args.eps});
}

void rms_norm_backward(OpContext& context, const RmsNormBackwardArgs& args) {
  const auto width = args.x.shape(1);
  over_rows(
      context, args.x.shape(0), width,
      elementwise_kernels().rms_norm_backward[type_index(args.grad_y)][type_index(args.x)][type_index(args.grad_x)],
      RmsNormBackwardRows{in(args.grad_y), in(args.x), args.weight.as<const float>(), out(args.grad_x), width, args.eps,
                          args.mode == GradMode::kAccumulate});
}

void rotary(OpContext& context, const RotaryArgs& args) {
  require_indices(RotaryArgs::kName, "positions", args.positions, args.cos.shape(0));
  const auto num_heads = args.x.shape(1), head_dim = args.x.shape(2);
  over_rows(context, args.x.shape(0), num_heads * head_dim,
            elementwise_kernels().rotary[type_index(args.x)][type_index(args.y)],
            RotaryRows{in(args.x), out(args.y), args.x.stride(1), args.y.stride(1), num_heads, head_dim / 2,
                       args.positions.as<const std::int32_t>(), args.cos.as<const float>(), args.sin.as<const float>(),
                       args.inverse ? -1.0f : 1.0f});
}

void silu_mul(OpContext& context, const SiluMulArgs& args) {
  const auto width = args.gate.shape(1);
  over_rows(context, args.gate.shape(0), width,
            elementwise_kernels().silu_mul[type_index(args.gate)][type_index(args.y)],
            SiluMulRows{in(args.gate), in(args.up), out(args.y), width});
}

void silu_mul_backward(OpContext& context, const SiluMulBackwardArgs& args) {
  const auto width = args.gate.shape(1);
  const auto& kernels = elementwise_kernels().silu_mul_backward[type_index(args.grad_y)][type_index(args.gate)];
  over_rows(
      context, args.gate.shape(0), width, kernels[type_index(args.grad_gate)][type_index(args.grad_up)],
      SiluMulBackwardRows{in(args.grad_y), in(args.gate), in(args.up), out(args.grad_gate), out(args.grad_up), width});
}

void gather_rows(OpContext& context, const GatherRowsArgs& args) {
  require_indices(GatherRowsArgs::kName, "index", args.index, args.x.shape(0));
  const auto width = args.x.shape(1);
  over_rows(context, args.y.shape(0), width, elementwise_kernels().copy[type_index(args.x)][type_index(args.y)],
            CopyRows{in(args.x), args.index.as<const std::int32_t>(), out(args.y), width, false});
}

void copy(OpContext& context, const CopyArgs& args) {
  const auto width = args.x.shape(1);
  over_rows(context, args.x.shape(0), width, elementwise_kernels().copy[type_index(args.x)][type_index(args.y)],
            CopyRows{in(args.x), nullptr, out(args.y), width, args.mode == GradMode::kAccumulate});
}

}  // namespace

void register_elementwise(OpRegistry& registry) {
  registry.add<RmsNormArgs>(DeviceKind::kCpu, rms_norm);
  registry.add<RmsNormBackwardArgs>(DeviceKind::kCpu, rms_norm_backward);
  registry.add<RotaryArgs>(DeviceKind::kCpu, rotary);
  registry.add<SiluMulArgs>(DeviceKind::kCpu, silu_mul);
  registry.add<SiluMulBackwardArgs>(DeviceKind::kCpu, silu_mul_backward);
  registry.add<GatherRowsArgs>(DeviceKind::kCpu, gather_rows);
  registry.add<CopyArgs>(DeviceKind::kCpu, copy);
}

}  // namespace flexcore::cpu
