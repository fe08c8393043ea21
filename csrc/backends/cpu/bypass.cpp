#include "backends/cpu/kernels/bypass.h"

#include <algorithm>
#include <cmath>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/lora.h"
#include "backends/cpu/rows.h"
#include "ops/dora.h"
#include "ops/dropout.h"
#include "ops/rows.h"
#include "ops/scale.h"

namespace flexcore::cpu {

namespace {

// y = x in the rows [begin, end).
void copy_rows(OpContext& context, const TensorView& x, const TensorView& y, std::int64_t begin, std::int64_t end) {
  if (begin < end && x.data() != y.data()) run(context, CopyArgs{x.rows(begin, end), y.rows(begin, end)});
}

// The rows of the segments are scaled, the others copied.
void scale_rows(OpContext& context, const TensorView& x, const TensorView& y, std::span<const ScaleSegment> segments,
                bool offsets) {
  const std::int64_t width = x.shape(1);
  std::int64_t row = 0;
  for (const auto& s : segments) {
    if (s.begin == s.end) continue;
    copy_rows(context, x, y, row, s.begin);
    row = s.end;
    const TensorView from = x.rows(s.begin, s.end), to = y.rows(s.begin, s.end);
    const ScaleRows rows{in(from), out(to), s.scale, offsets ? s.offset : nullptr, width};
    context.threads->parallel_for(s.end - s.begin, grain(width), [&](std::int64_t begin, std::int64_t end, int) {
      bypass_kernels().scale[type_index(x)][type_index(y)](rows, begin, end);
    });
  }
  copy_rows(context, x, y, row, x.shape(0));
}

void scale(OpContext& context, const ScaleArgs& args) { scale_rows(context, args.x, args.y, args.segments, true); }

void scale_backward(OpContext& context, const ScaleBackwardArgs& args) {
  const std::int64_t width = args.grad_y.shape(1);
  for (const auto& s : args.segments) {
    if (s.begin == s.end) continue;
    const ScaleGradient gradient{in(args.grad_y.rows(s.begin, s.end)),
                                 in(args.x.rows(s.begin, s.end)),
                                 s.end - s.begin,
                                 s.offset,
                                 s.grad_divisor,
                                 s.grad_scale};
    // Whole vectors a part: a column's bits do not depend on where the columns are cut.
    constexpr std::int64_t kColumns = 16;
    context.threads->parallel_for((width + kColumns - 1) / kColumns, grain(kColumns * (s.end - s.begin)),
                                  [&](std::int64_t begin, std::int64_t end, int) {
                                    bypass_kernels().scale_gradient[type_index(args.grad_y)][type_index(args.x)](
                                        gradient, begin * kColumns, std::min(end * kColumns, width));
                                  });
  }
  if (args.grad_x) scale_rows(context, args.grad_y, args.grad_x, args.segments, false);
}

void dropout(OpContext& context, const DropoutArgs& args) {
  const std::int64_t width = args.x.shape(1);
  const auto threshold = static_cast<std::uint32_t>(std::lround(args.mask.p * 65536.0));
  const float scale = 65536.0f / static_cast<float>(65536 - std::min<std::uint32_t>(threshold, 65535));
  const DropoutRows rows{
      .x = in(args.x),
      .y = out(args.y),
      .width = width,
      .threshold = threshold,
      .kept = args.kept * scale + args.all,
      .dropped = args.all,
      .key = {static_cast<std::uint32_t>(args.mask.seed), static_cast<std::uint32_t>(args.mask.seed >> 32)},
      .position = static_cast<std::uint32_t>(args.position),
      .module = args.mask.module,
      .sequence = args.mask.sequence,
      .accumulate = args.mode == GradMode::kAccumulate};
  context.threads->parallel_for(args.x.shape(0), grain(4 * width), [&](std::int64_t begin, std::int64_t end, int) {
    bypass_kernels().dropout[type_index(args.x)][type_index(args.y)](rows, begin, end);
  });
}

// Some rows of W at a time, to which scaling * B A is added as to any y.
void dora_scale(OpContext& context, const DoraScaleArgs& args) {
  constexpr std::int64_t kRows = 64;
  const std::int64_t out_features = args.weight.out_features, in_features = args.weight.in_features;
  const Arena::Scope scope(*context.scratch);
  const TensorView ids = context.scratch->tensor(DType::kInt32, {kRows});
  const TensorView weight = context.scratch->tensor(DType::kFloat32, {kRows, in_features});
  auto* norm = args.norm.as<float>();
  for (std::int64_t first = 0; first < out_features; first += kRows) {
    const std::int64_t rows = std::min(kRows, out_features - first);
    for (std::int64_t i = 0; i < rows; ++i) ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(first + i);
    run(context, EmbeddingArgs{ids.rows(0, rows), args.weight, weight.rows(0, rows)});
    context.threads->parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
      lora_kernels().expand[0]({args.lora_b + (first + begin) * args.rank, args.rank, end - begin, args.rank,
                                args.lora_a, in_features, true, args.scaling, weight.row<float>(begin), in_features, 0,
                                in_features});
      bypass_kernels().norm({weight.as<float>(), in_features, in_features, norm + first}, begin, end);
    });
  }
  auto* result = args.scale.as<float>();
  for (std::int64_t i = 0; i < out_features; ++i)
    result[i] = args.magnitude == nullptr ? 1.0f : norm[i] == 0.0f ? 0.0f : args.magnitude[i] / norm[i];
}

}  // namespace

void register_bypass(OpRegistry& registry) {
  registry.add<ScaleArgs>(DeviceKind::kCpu, scale);
  registry.add<ScaleBackwardArgs>(DeviceKind::kCpu, scale_backward);
  registry.add<DropoutArgs>(DeviceKind::kCpu, dropout);
  registry.add<DoraScaleArgs>(DeviceKind::kCpu, dora_scale);
}

}  // namespace flexcore::cpu
