#include "backends/cpu/packed_weight.h"

#include "backends/cpu/families.h"
#include "ops/rows.h"

namespace flexcore::cpu {

namespace {

static_assert(kMostGroup == kMostGroupSize);

std::int64_t panel_count(std::int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

void packed_weight_bytes(OpContext&, const PackedWeightBytesArgs& args) {
  *args.bytes =
      static_cast<std::size_t>(panel_count(args.out_features) * panel_bytes(args.format, args.dtype, args.in_features));
}

void pack_weight(OpContext& context, const PackWeightArgs& args) {
  const std::int64_t k = args.source.shape(1);
  const std::int64_t bytes = panel_bytes(args.format, args.dtype, k);
  context.threads->parallel_for(panel_count(args.source.shape(0)), 1, [&](std::int64_t begin, std::int64_t end, int) {
    auto* packed = static_cast<std::uint8_t*>(args.packed) + begin * bytes;
    if (args.format.quantized()) {
      quantized_kernels().quantize_panels({.layout = quantized_layout(args.format, k),
                                           .source = args.source.data(),
                                           .from = element(args.source.dtype()),
                                           .stride = args.source.stride(0),
                                           .rows = args.source.shape(0),
                                           .begin = begin,
                                           .end = end,
                                           .packed = packed});
      return;
    }
    gemm_kernels().pack_panels({.source = args.source.data(),
                                .from = element(args.source.dtype()),
                                .stride = args.source.stride(0),
                                .rows = args.source.shape(0),
                                .k = k,
                                .begin = begin,
                                .end = end,
                                .to = element(args.dtype),
                                .packed = packed});
  });
}

void embedding(OpContext& context, const EmbeddingArgs& args) {
  const std::int64_t k = args.weight.in_features;
  const auto* ids = args.token_ids.as<std::int32_t>();
  for (std::int64_t i = 0; i < args.token_ids.size(); ++i) {
    require(0 <= ids[i] && ids[i] < args.weight.out_features, EmbeddingArgs::kName, ": token_ids[", i, "] is ", ids[i],
            ", wanted [0, ", args.weight.out_features, ")");
  }
  const std::size_t element_bytes = dtype_size(args.y.dtype());
  const std::int64_t y_stride = args.y.stride(0);
  context.threads->parallel_for(args.token_ids.size(), 16, [&](std::int64_t begin, std::int64_t end, int) {
    auto* y = args.y.as<std::byte>() + static_cast<std::size_t>(begin * y_stride) * element_bytes;
    if (args.weight.format.quantized()) {
      quantized_kernels().gather_rows({.layout = quantized_layout(args.weight.format, k),
                                       .packed = static_cast<const std::uint8_t*>(args.weight.data),
                                       .rounded = args.weight.dtype == DType::kBFloat16,
                                       .ids = ids + begin,
                                       .count = end - begin,
                                       .y = y,
                                       .to = element(args.y.dtype()),
                                       .y_stride = y_stride});
      return;
    }
    gemm_kernels().gather_rows({.weight = args.weight.data,
                                .from = element(args.weight.dtype),
                                .packed = args.weight.packed,
                                .k = k,
                                .ids = ids + begin,
                                .count = end - begin,
                                .y = y,
                                .to = element(args.y.dtype()),
                                .y_stride = y_stride});
  });
}

}  // namespace

Element element(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Element::kFloat32;
    case DType::kBFloat16:
      return Element::kBFloat16;
    case DType::kFloat16:
      return Element::kFloat16;
    default:
      throw Unsupported(str("cpu gemm: dtype ", dtype_name(dtype), ", wanted float32, bfloat16 or float16"));
  }
}

std::int64_t packed_depth(DType dtype, std::int64_t in_features) {
  return dtype == DType::kBFloat16 ? (in_features + 1) / 2 * 2 : in_features;
}

QuantizedLayout quantized_layout(const WeightFormat& format, std::int64_t in_features) {
  const Codes codes = format.kind == WeightFormat::Kind::kInt8   ? Codes::kInt8
                      : format.kind == WeightFormat::Kind::kInt4 ? Codes::kInt4
                                                                 : Codes::kNf4;
  return {codes, format.group_size, in_features};
}

std::int64_t panel_bytes(const WeightFormat& format, DType dtype, std::int64_t in_features) {
  if (format.quantized()) return quantized_layout(format, in_features).panel_bytes();
  return kPanelRows * packed_depth(dtype, in_features) * static_cast<std::int64_t>(dtype_size(dtype));
}

WeightView weight_rows(const WeightView& weight, std::int64_t begin, std::int64_t end) {
  require(0 <= begin && begin <= end && end <= weight.out_features && (!weight.packed || begin % kPanelRows == 0),
          "weight rows [", begin, ", ", end, ") of ", weight.out_features, weight.packed ? " packed" : "",
          ", wanted a begin that is a multiple of ", weight.packed ? kPanelRows : 1);
  WeightView rows = weight;
  const std::int64_t bytes = weight.packed
                                 ? begin / kPanelRows * panel_bytes(weight.format, weight.dtype, weight.in_features)
                                 : begin * weight.in_features * static_cast<std::int64_t>(dtype_size(weight.dtype));
  rows.data = static_cast<const std::byte*>(weight.data) + bytes;
  rows.out_features = end - begin;
  return rows;
}

void register_packed_weight(OpRegistry& registry) {
  registry.add<PackWeightArgs>(DeviceKind::kCpu, pack_weight);
  registry.add<PackedWeightBytesArgs>(DeviceKind::kCpu, packed_weight_bytes);
  registry.add<EmbeddingArgs>(DeviceKind::kCpu, embedding);
}

}  // namespace flexcore::cpu
