#include "ops/weight.h"

#include "ops/require.h"

namespace flexcore {

namespace {

void require_packed_dtype(std::string_view op, DType dtype) {
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16, op, ": dtype is ", dtype_name(dtype),
          ", wanted float32 or bfloat16");
}

void require_format(std::string_view op, const WeightFormat& format) {
  if (!format.quantized()) return;
  require(format.group_size >= kGroupMultiple && format.group_size <= kMostGroupSize &&
              format.group_size % kGroupMultiple == 0,
          op, ": group_size is ", format.group_size, ", wanted a multiple of ", kGroupMultiple, " up to ",
          kMostGroupSize);
}

}  // namespace

TensorView WeightView::plain() const {
  require(!packed, "weight [", out_features, ", ", in_features, "] is packed, wanted row-major");
  return TensorView(const_cast<void*>(data), dtype, {out_features, in_features});
}

void check(const PackWeightArgs& args) {
  constexpr auto op = PackWeightArgs::kName;
  const auto& source = args.source;
  require(source.ndim() == 2 && source.shape(1) >= 1, op, ": source is ", source,
          ", wanted [out_features, in_features]");
  require(source.dtype() == DType::kFloat32 || source.dtype() == DType::kBFloat16 || source.dtype() == DType::kFloat16,
          op, ": source is ", source, ", wanted float32, bfloat16 or float16");
  require(source.stride(1) == 1, op, ": source has stride ", source.stride(1), " in its last dimension, wanted 1");
  require(!args.on_device || source.stride(0) == source.shape(1), op, ": source has stride ", source.stride(0),
          " on the device, wanted ", source.shape(1));
  require_packed_dtype(op, args.dtype);
  require_format(op, args.format);
  require(source.shape(0) == 0 || source.data() != nullptr, op, ": source is ", source, " without memory");
  require(source.shape(0) == 0 || args.packed != nullptr, op, ": packed is null, wanted packed_weight_bytes bytes");
}

void check(const PackedWeightBytesArgs& args) {
  constexpr auto op = PackedWeightBytesArgs::kName;
  require(args.out_features >= 0 && args.in_features >= 1, op, ": shape is [", args.out_features, ", ",
          args.in_features, "], wanted [>= 0, >= 1]");
  require_packed_dtype(op, args.dtype);
  require_format(op, args.format);
  require(args.bytes != nullptr, op, ": bytes is null, wanted the address of the result");
}

}  // namespace flexcore
