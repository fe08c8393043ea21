#include "backends/cuda/families.h"
#include "backends/cuda/kernels/codes.cuh"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/tables.h"
#include "backends/cuda/views.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/rows.h"
#include "ops/scatter.h"
#include "ops/silu_mul.h"

namespace flexcore::cuda {

namespace {

void rms_norm(OpContext& context, const RmsNormArgs& args) {
  const std::int64_t width = args.x.shape(1);
  const bool packs = all_packs(width, args.x, args.y) && aligned_for_packs(args.weight);
  over_norm_rows(rms_norm_kernel<kPackElements>, rms_norm_kernel<1>,
                 RmsNorm{rows_of(args.x), rows_of(args.y), args.weight.as<const float>(), args.eps}, args.x.shape(0),
                 width, packs, handle_of(context));
  check_launch(args.kName);
}

void rms_norm_backward(OpContext& context, const RmsNormBackwardArgs& args) {
  const std::int64_t width = args.x.shape(1);
  const bool packs = all_packs(width, args.grad_y, args.x, args.grad_x) && aligned_for_packs(args.weight);
  over_norm_rows(rms_norm_backward_kernel<kPackElements>, rms_norm_backward_kernel<1>,
                 RmsNormBackward{rows_of(args.grad_y), rows_of(args.x), rows_of(args.grad_x),
                                 args.weight.as<const float>(), args.eps, args.mode == GradMode::kAccumulate},
                 args.x.shape(0), width, packs, handle_of(context));
  check_launch(args.kName);
}

void rotary(OpContext& context, const RotaryArgs& args) {
  const std::int64_t half = args.x.shape(2) / 2, width = args.x.shape(1) * half;
  const bool packs = all_packs(half, args.x, args.y) && args.x.stride(1) % kPackElements == 0 &&
                     args.y.stride(1) % kPackElements == 0 && aligned_for_packs(args.cos) &&
                     aligned_for_packs(args.sin);
  const Rotary rotary{rows_of(args.x),
                      rows_of(args.y),
                      args.x.stride(1),
                      args.y.stride(1),
                      half,
                      args.positions.as<const std::int32_t>(),
                      args.cos.shape(0),
                      args.cos.as<const float>(),
                      args.sin.as<const float>(),
                      args.inverse ? -1.0f : 1.0f};
  map_rows(rotary, args.x.shape(0), width, packs, handle_of(context));
  check_launch(args.kName);
}

void silu_mul(OpContext& context, const SiluMulArgs& args) {
  const std::int64_t width = args.gate.shape(1);
  map_rows(SiluMul{rows_of(args.gate), rows_of(args.up), rows_of(args.y)}, args.gate.shape(0), width,
           all_packs(width, args.gate, args.up, args.y), handle_of(context));
  check_launch(args.kName);
}

void silu_mul_backward(OpContext& context, const SiluMulBackwardArgs& args) {
  const std::int64_t width = args.gate.shape(1);
  const auto output = [](const TensorView& t) { return t ? rows_of(t) : Rows{}; };
  bool packs = all_packs(width, args.grad_y, args.gate, args.up);
  for (const auto& t : {args.grad_gate, args.grad_up}) packs = packs && (!t || all_packs(width, t));
  map_rows(SiluMulBackward{rows_of(args.grad_y), rows_of(args.gate), rows_of(args.up), output(args.grad_gate),
                           output(args.grad_up)},
           args.gate.shape(0), width, packs, handle_of(context));
  check_launch(args.kName);
}

void gather_rows(OpContext& context, const GatherRowsArgs& args) {
  const std::int64_t width = args.x.shape(1);
  map_rows(CopyRows{rows_of(args.x), rows_of(args.y), args.index.as<const std::int32_t>(), args.x.shape(0), false},
           args.y.shape(0), width, all_packs(width, args.x, args.y), handle_of(context));
  check_launch(args.kName);
}

void copy(OpContext& context, const CopyArgs& args) {
  const std::int64_t width = args.x.shape(1);
  map_rows(CopyRows{rows_of(args.x), rows_of(args.y), nullptr, 0, args.mode == GradMode::kAccumulate}, args.x.shape(0),
           width, all_packs(width, args.x, args.y), handle_of(context));
  check_launch(args.kName);
}

void zero(OpContext& context, const ZeroArgs& args) {
  if (!args.y.empty()) require_cuda(cudaMemsetAsync(args.y.data(), 0, args.y.bytes(), handle_of(context)), "zero");
}

void scatter_rows(OpContext& context, const ScatterRowsArgs& args) {
  const std::int64_t width = args.x.shape(1);
  map_rows(ScatterRows{rows_of(args.x), rows_of(args.y), args.index.as<const std::int32_t>(), args.y.shape(0)},
           args.x.shape(0), width, all_packs(width, args.x, args.y), handle_of(context));
  check_launch(args.kName);
}

struct RowStorePlan {
  std::vector<RowStore> stores;  // by row of the batch
  HostTables tables() const { return HostTables().add(stores); }
  bool fits(const RowStorePlan&) const { return true; }
};

RowStorePlan plan_stores(std::span<const SaveSpan> spans, std::int64_t num_rows) {
  RowStorePlan plan{std::vector<RowStore>(static_cast<std::size_t>(num_rows))};
  for (const auto& span : spans)
    for (std::int64_t row = span.row_begin; row < span.row_end; ++row)
      plan.stores[static_cast<std::size_t>(row)] = {span.store, span.length, span.position + row - span.row_begin};
  return plan;
}

static_assert(kCodeGroup == kGroupWidth);

void save_rows(OpContext& context, const SaveRowsArgs& args) {
  const CallScope scope(context);
  const std::int64_t num_rows = args.x.shape(0), width = args.x.shape(1);
  static const char what = 0;
  const auto placed = place_once(context, batch_key(&what, args.spans, {num_rows}),
                                 [spans = args.spans, num_rows] { return plan_stores(spans, num_rows); });
  if (args.dtype == DType::kUInt8) {
    if (num_rows == 0 || width == 0) return;
    const std::int64_t groups = (width + kCodeGroup - 1) / kCodeGroup;
    launch(quantize_rows_kernel,
           dim3(static_cast<unsigned>(num_rows), static_cast<unsigned>((groups + kCodeWarps - 1) / kCodeWarps)),
           dim3(kCodeWarps * kWarpSize), 0, handle_of(context), rows_of(args.x), placed->device.get<RowStore>(0),
           static_cast<std::int64_t>(args.offset), width, kept_row_bytes(DType::kUInt8, width));
    check_launch(args.kName);
    return;
  }
  bool packs = all_packs(width, args.x) && args.offset % 16 == 0;
  for (const auto& span : args.spans) packs = packs && reinterpret_cast<std::uintptr_t>(span.store) % 16 == 0;
  map_rows(SaveRows{rows_of(args.x), placed->device.get<RowStore>(0), static_cast<std::int64_t>(args.offset), width,
                    args.dtype == DType::kBFloat16},
           num_rows, width, packs, handle_of(context));
  check_launch(args.kName);
}

void load_rows(OpContext& context, const LoadRowsArgs& args) {
  const std::int64_t width = args.y.shape(1);
  // Rows of codes are whole multiples of 16 bytes, so that packs of eight are aligned where y's are.
  const bool packs = all_packs(width, args.y) && reinterpret_cast<std::uintptr_t>(args.x.data()) % 8 == 0;
  map_rows(LoadCodes{args.x.as<unsigned char>(), args.x.stride(0), width, rows_of(args.y)}, args.y.shape(0), width,
           packs, handle_of(context));
  check_launch(args.kName);
}

}  // namespace

void register_elementwise(OpRegistry& registry) {
  registry.add<RmsNormArgs>(DeviceKind::kCuda, rms_norm);
  registry.add<RmsNormBackwardArgs>(DeviceKind::kCuda, rms_norm_backward);
  registry.add<RotaryArgs>(DeviceKind::kCuda, rotary);
  registry.add<SiluMulArgs>(DeviceKind::kCuda, silu_mul);
  registry.add<SiluMulBackwardArgs>(DeviceKind::kCuda, silu_mul_backward);
  registry.add<GatherRowsArgs>(DeviceKind::kCuda, gather_rows);
  registry.add<CopyArgs>(DeviceKind::kCuda, copy);
  registry.add<ZeroArgs>(DeviceKind::kCuda, zero);
  registry.add<ScatterRowsArgs>(DeviceKind::kCuda, scatter_rows);
  registry.add<SaveRowsArgs>(DeviceKind::kCuda, save_rows);
  registry.add<LoadRowsArgs>(DeviceKind::kCuda, load_rows);
}

}  // namespace flexcore::cuda
