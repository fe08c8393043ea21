#include "backends/cuda/kernels/quantized.cuh"
#include "backends/cuda/quantized.h"
#include "backends/cuda/views.h"

namespace flexcore::cuda {

namespace {

Codes codes_of(const WeightFormat& format) {
  return format.kind == WeightFormat::Kind::kInt8   ? Codes::kInt8
         : format.kind == WeightFormat::Kind::kInt4 ? Codes::kInt4
                                                    : Codes::kNf4;
}

QuantizedRows rows_of(const WeightView& w) {
  QuantizedRows rows =
      QuantizedRows::layout(codes_of(w.format), w.in_features, w.format.group_size, w.dtype == DType::kBFloat16);
  rows.data = static_cast<std::uint8_t*>(const_cast<void*>(w.data));
  return rows;
}

template <Codes kCodes>
struct Constant {
  static constexpr Codes value = kCodes;
};

// f(Constant<codes>) for the codes of a format.
template <class F>
void dispatch(const WeightFormat& format, F&& f) {
  switch (codes_of(format)) {
    case Codes::kInt8:
      return f(Constant<Codes::kInt8>{});
    case Codes::kInt4:
      return f(Constant<Codes::kInt4>{});
    case Codes::kNf4:
      return f(Constant<Codes::kNf4>{});
  }
}

unsigned blocks_for(std::int64_t items, std::int64_t a_block) {
  return static_cast<unsigned>((items + a_block - 1) / a_block);
}

template <Codes kCodes, int kRows>
void launch_rows(OpContext& context, const QuantizedProduct& product) {
  launch(quantized_rows_kernel<kCodes, kRows>, dim3(blocks_for(product.outputs, kFewRowsWarps * kFewRowsOutputs)),
         dim3(kFewRowsWarps * kWarpSize), kLevelBytes, handle_of(context), product);
}

}  // namespace

std::int64_t packed_row_bytes(const WeightFormat& format, DType dtype, std::int64_t in_features) {
  if (!format.quantized()) return in_features * static_cast<std::int64_t>(dtype_size(dtype));
  return QuantizedRows::layout(codes_of(format), in_features, format.group_size, false).row_bytes;
}

void quantize(OpContext& context, const TensorView& source, const WeightFormat& format, void* packed) {
  if (source.empty()) return;
  constexpr int kThreads = 256;
  QuantizedRows rows = QuantizedRows::layout(codes_of(format), source.shape(1), format.group_size, false);
  rows.data = static_cast<std::uint8_t*>(packed);
  const SourceType from = source.dtype() == DType::kFloat32    ? SourceType::kFloat32
                          : source.dtype() == DType::kBFloat16 ? SourceType::kBFloat16
                                                               : SourceType::kFloat16;
  const Quantize args{source.data(), from, source.shape(0), rows};
  const std::int64_t warps = source.shape(0) * format.groups(source.shape(1));
  dispatch(format, [&](auto codes) {
    launch(quantize_kernel<codes.value>, dim3(blocks_for(warps, kThreads / kWarpSize)), dim3(kThreads), kLevelBytes,
           handle_of(context), args);
  });
  check_launch("pack_weight");
}

void dequantize(OpContext& context, const WeightView& weight, const TensorView& y, const std::int32_t* index) {
  if (y.empty()) return;
  constexpr int kThreads = 128, kAtOnce = 8;
  const Dequantize args{rows_of(weight), rows_of(y), index, weight.out_features};
  const dim3 grid(static_cast<unsigned>(y.shape(0)), blocks_for(weight.in_features, kThreads * kAtOnce));
  dispatch(weight.format, [&](auto codes) {
    launch(dequantize_kernel<codes.value>, grid, dim3(kThreads), kLevelBytes, handle_of(context), args,
           all_packs(weight.in_features, y));
  });
  check_launch("dequantize");
}

void quantized_product(OpContext& context, const TensorView& x, const WeightView& weight, const TensorView& y,
                       const TensorView& bias, bool accumulate) {
  const QuantizedProduct product{rows_of(x),
                                 rows_of(weight),
                                 rows_of(y),
                                 bias ? rows_of(bias.reshape({1, bias.shape(0)})) : Rows{},
                                 x.shape(0),
                                 weight.out_features,
                                 all_packs(weight.in_features, x),
                                 accumulate};
  dispatch(weight.format, [&](auto codes) {
    if (product.rows == 1)
      launch_rows<codes.value, 1>(context, product);
    else if (product.rows == 2)
      launch_rows<codes.value, 2>(context, product);
    else if (product.rows <= 4)
      launch_rows<codes.value, 4>(context, product);
    else
      launch_rows<codes.value, kFewRows>(context, product);
  });
  check_launch("linear");
}

}  // namespace flexcore::cuda
