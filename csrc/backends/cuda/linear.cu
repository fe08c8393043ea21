#include <algorithm>

#include "backends/cuda/families.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/kernels/pack.cuh"
#include "backends/cuda/quantized.h"
#include "backends/cuda/scratch.h"
#include "backends/cuda/views.h"
#include "ops/linear.h"
#include "ops/rows.h"

namespace flexcore::cuda {

namespace {

void convert(OpContext& context, const TensorView& x, const TensorView& y, const char* op) {
  const std::int64_t width = x.shape(1);
  map_rows(CopyRows{rows_of(x), rows_of(y), nullptr, 0, false}, x.shape(0), width, all_packs(width, x, y),
           handle_of(context));
  check_launch(op);
}

// `x` itself, or a copy of it in the weight's dtype.
TensorView in_dtype(OpContext& context, const TensorView& x, DType dtype, const char* op) {
  if (x.dtype() == dtype) return x;
  const TensorView y = context.scratch->tensor(dtype, {x.shape(0), x.shape(1)});
  convert(context, x, y, op);
  return y;
}

std::int64_t element_size(DType dtype) { return static_cast<std::int64_t>(dtype_size(dtype)); }

// Whether b's columns follow a's in the same rows.
bool follows(const TensorView& a, const TensorView& b) {
  return a.dtype() == b.dtype() && a.stride(0) == b.stride(0) &&
         b.data() == a.as<std::byte>() + a.shape(1) * element_size(a.dtype());
}
bool follows(const WeightView& a, const WeightView& b) {
  return a.dtype == b.dtype && a.format == b.format && a.in_features == b.in_features &&
         b.data == static_cast<const std::byte*>(a.data) +
                       a.out_features * packed_row_bytes(a.format, a.dtype, a.in_features);
}

/// Neighbours that one product computes, as a member of their own.
TensorView joined(TensorView first, std::int64_t width) {
  TensorView all(first.data(), first.dtype(), {first.shape(0), width});
  all.set_stride(0, first.stride(0));
  return all;
}
// Rows [begin, end) of neighbours.
WeightView joined(const WeightView& first, std::int64_t begin, std::int64_t end) {
  WeightView all = first;
  all.data = static_cast<const std::byte*>(first.data) +
             begin * packed_row_bytes(first.format, first.dtype, first.in_features);
  all.out_features = end - begin;
  return all;
}
// Dense "packed" is row-major in the computing dtype: what the GEMM library wants for both directions, and what look-up
// reads.
TensorView dense(const WeightView& weight) {
  return TensorView(const_cast<void*>(weight.data), weight.dtype, {weight.out_features, weight.in_features});
}

// Outputs whose quantised weights are made dense at once: a product of so many is a good one, and the scratch is small
// beside what the codes save.
constexpr std::int64_t kDenseBytes = std::int64_t{64} << 20, kOutputsMultiple = 128;
std::int64_t outputs_at_once(std::int64_t in_features, std::int64_t element) {
  return std::max(kOutputsMultiple, kDenseBytes / (in_features * element) / kOutputsMultiple * kOutputsMultiple);
}

// visit(dense matrix, first output, one beyond the last) for parts of neighbours, until all outputs were there.
template <class Visit>
void for_dense(OpContext& context, const WeightView& first, std::int64_t width, Visit&& visit) {
  if (!first.format.quantized()) return visit(dense(joined(first, 0, width)), 0, width);
  const std::int64_t at_once = outputs_at_once(first.in_features, element_size(first.dtype));
  for (std::int64_t begin = 0; begin < width; begin += at_once) {
    const std::int64_t end = std::min(begin + at_once, width);
    const Arena::Scope scope(*context.scratch);
    const TensorView matrix = context.scratch->tensor(first.dtype, {end - begin, first.in_features});
    dequantize(context, joined(first, begin, end), matrix);
    visit(matrix, begin, end);
  }
}

TensorView columns(const TensorView& t, std::int64_t begin, std::int64_t end) {
  TensorView part(t.as<std::byte>() + begin * element_size(t.dtype()), t.dtype(), {t.shape(0), end - begin});
  part.set_stride(0, t.stride(0));
  return part;
}

// visit(first member, one beyond the last, features of all of them) for members that follow each other.
template <class Members, class Output, class Visit>
void for_neighbours(const Members& members, Output&& output, Visit&& visit) {
  for (std::size_t i = 0; i < members.size();) {
    std::int64_t width = members[i].weight.out_features;
    std::size_t end = i + 1;
    const TensorView first = output(members[i]);
    for (; end < members.size() && follows(members[end - 1].weight, members[end].weight) &&
           follows(output(members[end - 1]), output(members[end])) &&
           first.stride(0) >= width + members[end].weight.out_features;
         ++end)
      width += members[end].weight.out_features;
    visit(i, end, width);
    i = end;
  }
}

// The biases of members side by side, in the dtype of y; nothing where there is none.
TensorView joined_bias(OpContext& context, std::span<const LinearArgs::Member> members, std::int64_t width) {
  const DType dtype = members[0].y.dtype();
  if (std::none_of(members.begin(), members.end(), [](const auto& m) { return static_cast<bool>(m.bias); })) return {};
  // The library's kernels read a bias in packs, and ask nobody how it is aligned.
  if (members.size() == 1 && members[0].bias.dtype() == dtype && aligned_for_packs(members[0].bias))
    return members[0].bias;
  const TensorView bias = context.scratch->tensor(dtype, {width});
  std::int64_t begin = 0;
  for (const auto& m : members) {
    const std::int64_t count = m.weight.out_features;
    const TensorView part(bias.as<std::byte>() + begin * element_size(dtype), dtype, {1, count});
    convert(context, m.bias.reshape({1, count}), part, "linear");
    begin += count;
  }
  return bias;
}

void linear(OpContext& context, const LinearArgs& args) {
  if (args.x.shape(0) == 0) return;
  const Arena::Scope scope(*context.scratch);
  TensorView converted[2];  // for float32 and for bfloat16 weights
  const auto product = [&](std::span<const LinearArgs::Member> members, std::int64_t width) {
    const auto& first = members[0];
    TensorView& x = converted[first.weight.dtype == DType::kBFloat16];
    if (!x) x = in_dtype(context, args.x, first.weight.dtype, "linear");
    const TensorView y = joined(first.y, width), bias = joined_bias(context, members, width);
    const bool accumulate = first.mode == GradMode::kAccumulate;
    if (first.weight.format.quantized() && x.shape(0) <= kFewRows)
      return quantized_product(context, x, joined(first.weight, 0, width), y, bias, accumulate);
    for_dense(context, first.weight, width, [&](const TensorView& weight, std::int64_t begin, std::int64_t end) {
      gemm(context, {.a = x,
                     .b = weight,
                     .c = columns(y, begin, end),
                     .bias = bias ? TensorView(bias.as<std::byte>() + begin * element_size(bias.dtype()), bias.dtype(),
                                               {end - begin})
                                  : TensorView(),
                     .transpose_b = true,
                     .accumulate = accumulate});
    });
  };
  for_neighbours(
      args.members, [](const auto& m) { return m.y; },
      [&](std::size_t begin, std::size_t end, std::int64_t width) {
        const auto members = args.members.subspan(begin, end - begin);
        const bool alike = std::all_of(members.begin(), members.end(), [&](const auto& m) {
          return m.mode == members[0].mode && static_cast<bool>(m.bias) == static_cast<bool>(members[0].bias);
        });
        if (alike) return product(members, width);
        for (std::size_t i = 0; i < members.size(); ++i) product(members.subspan(i, 1), members[i].weight.out_features);
      });
}

void linear_backward(OpContext& context, const LinearBackwardArgs& args) {
  if (args.grad_x.shape(0) == 0) return;
  const Arena::Scope scope(*context.scratch);
  bool accumulate = args.mode == GradMode::kAccumulate;
  for_neighbours(
      args.members, [](const auto& m) { return m.grad_y; },
      [&](std::size_t begin, std::size_t, std::int64_t width) {
        const auto& first = args.members[begin];
        const TensorView grad_y = in_dtype(context, joined(first.grad_y, width), first.weight.dtype, "linear_backward");
        for_dense(context, first.weight, width, [&](const TensorView& weight, std::int64_t begin, std::int64_t end) {
          gemm(context, {.a = columns(grad_y, begin, end), .b = weight, .c = args.grad_x, .accumulate = accumulate});
          accumulate = true;
        });
      });
}

constexpr std::int64_t kPartBytes = std::int64_t{16} << 20;

// Rows of the host's on the device, in scratch.
TensorView upload_rows(OpContext& context, const TensorView& rows) {
  const std::int64_t width = rows.shape(1);
  const auto row_bytes = static_cast<std::size_t>(width) * dtype_size(rows.dtype());
  const TensorView part = context.scratch->tensor(rows.dtype(), {rows.shape(0), width});
  const bool whole = rows.stride(0) == width;
  for (std::int64_t row = 0; row < rows.shape(0); row += whole ? rows.shape(0) : 1)
    stream_of(context).staging.upload(part.rows(row, row + 1).data(), rows.rows(row, row + 1).data(),
                                      row_bytes * static_cast<std::size_t>(whole ? rows.shape(0) : 1));
  return part;
}

// In parts, converted on the device.
void pack_weight(OpContext& context, const PackWeightArgs& args) {
  const std::int64_t width = args.source.shape(1);
  const auto element = static_cast<std::int64_t>(dtype_size(args.source.dtype()));
  const std::int64_t rows_at_once = std::max<std::int64_t>(1, kPartBytes / (width * element));
  const WeightView packed{args.packed, args.dtype, args.source.shape(0), width, true, args.format};
  for (std::int64_t begin = 0; begin < args.source.shape(0); begin += rows_at_once) {
    const std::int64_t end = std::min(begin + rows_at_once, args.source.shape(0));
    const Arena::Scope scope(*context.scratch);
    const TensorView source = args.source.rows(begin, end),
                     part = args.on_device ? source : upload_rows(context, source);
    const WeightView rows = joined(packed, begin, end);
    if (args.format.quantized()) {
      quantize(context, part, args.format, const_cast<void*>(rows.data));
      continue;
    }
    const TensorView out = dense(rows);
    if (part.dtype() == DType::kFloat16) {
      map_rows(FromHalf{part.as<const std::uint16_t>(), width, rows_of(out)}, end - begin, width, all_packs(width, out),
               handle_of(context));
      check_launch("pack_weight");
    } else {
      convert(context, part, out, "pack_weight");
    }
  }
}

void packed_weight_bytes(OpContext&, const PackedWeightBytesArgs& args) {
  *args.bytes =
      static_cast<std::size_t>(args.out_features * packed_row_bytes(args.format, args.dtype, args.in_features));
}

void embedding(OpContext& context, const EmbeddingArgs& args) {
  if (args.weight.format.quantized())
    return dequantize(context, args.weight, args.y, args.token_ids.as<const std::int32_t>());
  const TensorView weight = dense(args.weight);
  const std::int64_t width = weight.shape(1);
  map_rows(CopyRows{rows_of(weight), rows_of(args.y), args.token_ids.as<const std::int32_t>(), weight.shape(0), false},
           args.y.shape(0), width, all_packs(width, weight, args.y), handle_of(context));
  check_launch("embedding");
}

}  // namespace

std::int64_t linear_scratch(const ScratchShape& s) {
  const std::int64_t converted = s.rows * (s.widest_input() + s.widest_outputs()) + s.widest_outputs();
  const std::int64_t packing = kPartBytes + 4 * s.widest_input();
  const std::int64_t largest = s.hidden_size * std::max(s.widest_input(), s.widest_outputs()) * 4,
                     at_once = std::max(kDenseBytes, kOutputsMultiple * s.widest_input() * 4);
  const std::int64_t dequantized = s.quantized ? std::min(largest, at_once) + 64 : 0;
  return std::max(kGemmWorkspaceBytes + converted * static_cast<std::int64_t>(sizeof(float)) + dequantized, packing);
}

void register_linear(OpRegistry& registry) {
  registry.add<LinearArgs>(DeviceKind::kCuda, linear);
  registry.add<LinearBackwardArgs>(DeviceKind::kCuda, linear_backward);
  registry.add<PackWeightArgs>(DeviceKind::kCuda, pack_weight);
  registry.add<PackedWeightBytesArgs>(DeviceKind::kCuda, packed_weight_bytes);
  registry.add<EmbeddingArgs>(DeviceKind::kCuda, embedding);
}

}  // namespace flexcore::cuda
