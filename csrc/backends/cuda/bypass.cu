#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "backends/cuda/families.h"
#include "backends/cuda/kernels/bypass.cuh"
#include "backends/cuda/views.h"
#include "ops/dora.h"
#include "ops/dropout.h"
#include "ops/rows.h"
#include "ops/scale.h"
#include "ops/transfer.h"

namespace flexcore::cuda {

namespace {

void copy_all(OpContext& context, const TensorView& x, const TensorView& y) {
  if (x.data() != y.data()) run(context, CopyArgs{x, y});
}

// The rows of the segments, in place.
void scale_in_place(OpContext& context, const TensorView& x, std::span<const ScaleSegment> segments, bool offsets) {
  const std::int64_t width = x.shape(1);
  if (width == 0) return;
  ScaleRuns runs{};
  bool packs = all_packs(width, x);
  const auto flush = [&] {
    if (runs.count == 0) return;
    runs.first_row = static_cast<int>(runs.run[0].begin);
    const auto rows = static_cast<unsigned>(runs.run[runs.count - 1].end - runs.run[0].begin);
    const std::int64_t items = packs ? width / kPackElements : width;
    const unsigned threads =
        static_cast<unsigned>(std::min<std::int64_t>(256, (items + kWarpSize - 1) / kWarpSize * kWarpSize));
    const dim3 grid(rows, static_cast<unsigned>((items + threads - 1) / threads));
    packs
        ? launch(scale_rows_kernel<kPackElements>, grid, dim3(threads), 0, handle_of(context), rows_of(x), runs, width)
        : launch(scale_rows_kernel<1>, grid, dim3(threads), 0, handle_of(context), rows_of(x), runs, width);
    runs.count = 0;
  };
  const auto aligned = [](const float* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  for (const auto& s : segments) packs = packs && aligned(s.scale) && aligned(s.offset);
  for (const auto& s : segments) {
    if (s.begin == s.end) continue;
    if (runs.count == kScaleRuns) flush();
    runs.run[runs.count++] = {s.begin, s.end, s.scale, offsets ? s.offset : nullptr};
  }
  flush();
}

void scale(OpContext& context, const ScaleArgs& args) {
  copy_all(context, args.x, args.y);
  scale_in_place(context, args.y, args.segments, true);
  check_launch(args.kName);
}

void scale_backward(OpContext& context, const ScaleBackwardArgs& args) {
  const std::int64_t width = args.grad_y.shape(1);
  for (const auto& s : args.segments) {
    if (s.begin == s.end || width == 0) continue;
    launch(scale_gradient_kernel, dim3(static_cast<unsigned>((width + kWarpSize - 1) / kWarpSize)),
           dim3(kWarpSize, kScaleGradientRows), kScaleGradientRows * kWarpSize * sizeof(float), handle_of(context),
           ScaleGradient{rows_of(args.grad_y), rows_of(args.x), s.begin, s.end, width, s.offset, s.grad_divisor,
                         s.grad_scale});
  }
  if (args.grad_x) {
    copy_all(context, args.grad_y, args.grad_x);
    scale_in_place(context, args.grad_x, args.segments, false);
  }
  check_launch(args.kName);
}

void dropout(OpContext& context, const DropoutArgs& args) {
  const std::int64_t rows = args.x.shape(0), width = args.x.shape(1);
  if (rows == 0 || width == 0) return;
  const auto threshold = static_cast<unsigned>(std::lround(args.mask.p * 65536.0));
  const float scale = 65536.0f / static_cast<float>(65536 - std::min(threshold, 65535u));
  const std::int64_t calls = (width + 127) / 128 * 16;
  const unsigned threads =
      static_cast<unsigned>(std::min<std::int64_t>(256, (calls + kWarpSize - 1) / kWarpSize * kWarpSize));
  launch(dropout_kernel, dim3(static_cast<unsigned>(rows), static_cast<unsigned>((calls + threads - 1) / threads)),
         dim3(threads), 0, handle_of(context),
         Dropout{.x = rows_of(args.x),
                 .y = rows_of(args.y),
                 .width = width,
                 .seed = args.mask.seed,
                 .position = static_cast<unsigned>(args.position),
                 .module = args.mask.module,
                 .sequence = args.mask.sequence,
                 .threshold = threshold,
                 .kept = args.kept * scale + args.all,
                 .dropped = args.all,
                 .accumulate = args.mode == GradMode::kAccumulate});
  check_launch(args.kName);
}

// Some rows of W at a time, looked up as floats.
void dora_scale(OpContext& context, const DoraScaleArgs& args) {
  constexpr std::int64_t kRows = 512;
  const std::int64_t out_features = args.weight.out_features, in_features = args.weight.in_features;
  const Arena::Scope scope(*context.scratch);
  const std::int64_t most = std::min(kRows, out_features);
  const TensorView ids = context.scratch->tensor(DType::kInt32, {most});
  const TensorView weight = context.scratch->tensor(DType::kFloat32, {most, in_features});
  std::vector<std::int32_t> host(static_cast<std::size_t>(most));
  for (std::int64_t first = 0; first < out_features; first += kRows) {
    const std::int64_t rows = std::min(kRows, out_features - first);
    std::iota(host.begin(), host.end(), static_cast<std::int32_t>(first));
    run(context, StageArgs{ids.data(), host.data(), static_cast<std::size_t>(rows) * sizeof(std::int32_t)});
    run(context, EmbeddingArgs{ids.rows(0, rows), args.weight, weight.rows(0, rows)});
    launch(dora_norm_kernel, dim3(static_cast<unsigned>(rows)), dim3(256),
           (static_cast<std::size_t>(args.rank) + kWarpSize) * sizeof(float), handle_of(context),
           DoraNorm{.weight = weight.as<float>(),
                    .width = in_features,
                    .first = first,
                    .lora_a = args.lora_a,
                    .lora_b = args.lora_b,
                    .rank = static_cast<int>(args.rank),
                    .scaling = args.scaling,
                    .magnitude = args.magnitude,
                    .norm = args.norm.as<float>(),
                    .scale = args.scale.as<float>()});
  }
  check_launch(args.kName);
}

}  // namespace

void register_bypass(OpRegistry& registry) {
  registry.add<ScaleArgs>(DeviceKind::kCuda, scale);
  registry.add<ScaleBackwardArgs>(DeviceKind::kCuda, scale_backward);
  registry.add<DropoutArgs>(DeviceKind::kCuda, dropout);
  registry.add<DoraScaleArgs>(DeviceKind::kCuda, dora_scale);
}

}  // namespace flexcore::cuda
