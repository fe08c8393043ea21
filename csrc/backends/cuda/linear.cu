#include <algorithm>

#include "backends/cuda/families.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/kernels/pack.cuh"
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
  return a.dtype == b.dtype && a.in_features == b.in_features &&
         b.data == static_cast<const std::byte*>(a.data) + a.out_features * a.in_features * element_size(a.dtype);
}

/// Neighbours that one product computes, as a member of their own.
TensorView joined(TensorView first, std::int64_t width) {
  TensorView all(first.data(), first.dtype(), {first.shape(0), width});
  all.set_stride(0, first.stride(0));
  return all;
}
// "Packed" is row-major in the computing dtype: what the GEMM library wants for both directions, and what look-up
// reads.
TensorView joined(const WeightView& first, std::int64_t out_features) {
  return TensorView(const_cast<void*>(first.data), first.dtype, {out_features, first.in_features});
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
    gemm(context, {.a = x,
                   .b = joined(first.weight, width),
                   .c = joined(first.y, width),
                   .bias = joined_bias(context, members, width),
                   .transpose_b = true,
                   .accumulate = first.mode == GradMode::kAccumulate});
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
        gemm(context, {.a = in_dtype(context, joined(first.grad_y, width), first.weight.dtype, "linear_backward"),
                       .b = joined(first.weight, width),
                       .c = args.grad_x,
                       .accumulate = accumulate});
        accumulate = true;
      });
}

constexpr std::int64_t kPartBytes = std::int64_t{16} << 20;

// The source is the host's: parts of it pass through scratch and are converted on the device.
void pack_weight(OpContext& context, const PackWeightArgs& args) {
  require<Unsupported>(!args.format.quantized(), "pack_weight: no quantised weights on CUDA");
  const std::int64_t width = args.source.shape(1);
  const auto element = static_cast<std::int64_t>(dtype_size(args.source.dtype()));
  const std::int64_t rows_at_once = std::max<std::int64_t>(1, kPartBytes / (width * element));
  const TensorView packed(args.packed, args.dtype, {args.source.shape(0), width});
  for (std::int64_t begin = 0; begin < args.source.shape(0); begin += rows_at_once) {
    const std::int64_t end = std::min(begin + rows_at_once, args.source.shape(0));
    const Arena::Scope scope(*context.scratch);
    const TensorView part = context.scratch->tensor(args.source.dtype(), {end - begin, width});
    for (std::int64_t row = begin; row < end; ++row) {
      if (args.source.stride(0) == width) {
        stream_of(context).staging.upload(part.data(), args.source.as<std::byte>() + begin * width * element,
                                          static_cast<std::size_t>((end - begin) * width * element));
        break;
      }
      stream_of(context).staging.upload(part.as<std::byte>() + (row - begin) * width * element,
                                        args.source.as<std::byte>() + row * args.source.stride(0) * element,
                                        static_cast<std::size_t>(width * element));
    }
    const TensorView out = packed.rows(begin, end);
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
  require<Unsupported>(!args.format.quantized(), "packed_weight_bytes: no quantised weights on CUDA");
  *args.bytes = static_cast<std::size_t>(args.out_features * args.in_features) * dtype_size(args.dtype);
}

void embedding(OpContext& context, const EmbeddingArgs& args) {
  const TensorView weight = joined(args.weight, args.weight.out_features);
  const std::int64_t width = weight.shape(1);
  map_rows(CopyRows{rows_of(weight), rows_of(args.y), args.token_ids.as<const std::int32_t>(), weight.shape(0), false},
           args.y.shape(0), width, all_packs(width, weight, args.y), handle_of(context));
  check_launch("embedding");
}

}  // namespace

std::int64_t linear_scratch(const ScratchShape& s) {
  const std::int64_t converted = s.rows * (s.widest_input() + s.widest_outputs()) + s.widest_outputs();
  const std::int64_t packing = kPartBytes + 4 * s.widest_input();
  return std::max(kGemmWorkspaceBytes + converted * static_cast<std::int64_t>(sizeof(float)), packing);
}

void register_linear(OpRegistry& registry) {
  registry.add<LinearArgs>(DeviceKind::kCuda, linear);
  registry.add<LinearBackwardArgs>(DeviceKind::kCuda, linear_backward);
  registry.add<PackWeightArgs>(DeviceKind::kCuda, pack_weight);
  registry.add<PackedWeightBytesArgs>(DeviceKind::kCuda, packed_weight_bytes);
  registry.add<EmbeddingArgs>(DeviceKind::kCuda, embedding);
}

}  // namespace flexcore::cuda
