#include "flexcore/tensor.h"

#include "core/check.h"

namespace flexcore {

std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kInt64:
      return 8;
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

TensorView::TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> shape)
    : data_(data), dtype_(dtype), ndim_(static_cast<int>(shape.size())) {
  require(ndim_ <= kMaxDims, "tensor: ", ndim_, " dimensions, wanted at most ", kMaxDims);
  int i = 0;
  for (const auto extent : shape) {
    require(extent >= 0, "tensor: extent ", extent, " in dimension ", i, ", wanted >= 0");
    shape_[i++] = extent;
  }
  std::int64_t stride = 1;
  for (int d = ndim_ - 1; d >= 0; --d) {
    strides_[d] = stride;
    stride *= shape_[d];
  }
}

std::int64_t TensorView::size() const {
  if (data_ == nullptr) return 0;
  std::int64_t n = 1;
  for (int d = 0; d < ndim_; ++d) n *= shape_[d];
  return n;
}

std::size_t TensorView::bytes() const { return static_cast<std::size_t>(size()) * dtype_size(dtype_); }

bool TensorView::contiguous() const {
  std::int64_t stride = 1;
  for (int d = ndim_ - 1; d >= 0; --d) {
    if (shape_[d] > 1 && strides_[d] != stride) return false;
    stride *= shape_[d];
  }
  return true;
}

TensorView TensorView::rows(std::int64_t begin, std::int64_t end) const {
  require(ndim_ >= 1 && 0 <= begin && begin <= end && end <= shape_[0], "tensor rows [", begin, ", ", end, ") of ",
          describe());
  TensorView view = *this;
  view.data_ = static_cast<std::byte*>(data_) + static_cast<std::size_t>(begin * strides_[0]) * dtype_size(dtype_);
  view.shape_[0] = end - begin;
  return view;
}

TensorView TensorView::reshape(std::initializer_list<std::int64_t> shape) const {
  TensorView view(data_, dtype_, shape);
  require(contiguous() && view.size() == size(), "tensor reshape: ", describe(), " to ", view.describe());
  return view;
}

TensorView TensorView::split_rows(std::int64_t count) const {
  require(ndim_ == 2 && count > 0 && shape_[1] % count == 0, "tensor: rows of ", describe(), " in ", count, " parts");
  TensorView view(data_, dtype_, {shape_[0], count, shape_[1] / count});
  view.strides_[0] = strides_[0];
  return view;
}

std::string TensorView::describe() const {
  std::string text = str(dtype_name(dtype_), " [");
  for (int d = 0; d < ndim_; ++d) text += str(d ? ", " : "", shape_[d]);
  return text + "]";
}

}  // namespace flexcore
