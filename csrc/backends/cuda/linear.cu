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

// "Packed" is row-major in the computing dtype: what the GEMM library wants for both directions, and what look-up
// reads.
TensorView matrix_of(const WeightView& weight) {
  return TensorView(const_cast<void*>(weight.data), weight.dtype, {weight.out_features, weight.in_features});
}

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

void linear(OpContext& context, const LinearArgs& args) {
  if (args.x.shape(0) == 0) return;
  const Arena::Scope scope(*context.scratch);
  TensorView converted[2];  // for float32 and for bfloat16 weights
  for (const auto& member : args.members) {
    TensorView& x = converted[member.weight.dtype == DType::kBFloat16];
    if (!x) x = in_dtype(context, args.x, member.weight.dtype, "linear");
    Gemm product{.a = x,
                 .b = matrix_of(member.weight),
                 .c = member.y,
                 .transpose_b = true,
                 .accumulate = member.mode == GradMode::kAccumulate};
    if (member.bias) {
      const std::int64_t width = member.weight.out_features;
      product.bias = in_dtype(context, member.bias.reshape({1, width}), member.y.dtype(), "linear").reshape({width});
    }
    gemm(context, product);
  }
}

void linear_backward(OpContext& context, const LinearBackwardArgs& args) {
  if (args.grad_x.shape(0) == 0) return;
  const Arena::Scope scope(*context.scratch);
  bool accumulate = args.mode == GradMode::kAccumulate;
  for (const auto& member : args.members) {
    gemm(context, {.a = in_dtype(context, member.grad_y, member.weight.dtype, "linear_backward"),
                   .b = matrix_of(member.weight),
                   .c = args.grad_x,
                   .accumulate = accumulate});
    accumulate = true;
  }
}

constexpr std::int64_t kPartBytes = std::int64_t{16} << 20;

// The source is the host's: parts of it pass through scratch and are converted on the device.
void pack_weight(OpContext& context, const PackWeightArgs& args) {
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
  *args.bytes = static_cast<std::size_t>(args.out_features * args.in_features) * dtype_size(args.dtype);
}

void embedding(OpContext& context, const EmbeddingArgs& args) {
  const TensorView weight = matrix_of(args.weight);
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
