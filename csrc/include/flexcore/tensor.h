#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

namespace flexcore {

enum class DType : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kUInt8 };

std::size_t dtype_size(DType dtype);
std::string_view dtype_name(DType dtype);  // "float32", "bfloat16", ...

enum class DeviceKind : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

/// A strided array that somebody else owns. Strides are in elements; at most four dimensions.
class TensorView {
 public:
  static constexpr int kMaxDims = 4;

  TensorView() = default;
  /// Row-major and contiguous.
  TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> shape);

  bool empty() const { return size() == 0; }
  explicit operator bool() const { return data_ != nullptr; }

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  /// Address of row `i` of the first dimension.
  template <class T>
  T* row(std::int64_t i) const {
    return static_cast<T*>(data_) + i * strides_[0];
  }

  DType dtype() const { return dtype_; }
  int ndim() const { return ndim_; }
  std::int64_t shape(int i) const { return shape_[i]; }
  std::int64_t stride(int i) const { return strides_[i]; }
  std::int64_t size() const;  // elements
  std::size_t bytes() const;  // of the elements, gaps left out
  bool contiguous() const;

  /// Rows [begin, end) of the first dimension.
  TensorView rows(std::int64_t begin, std::int64_t end) const;
  /// The same elements under another shape; the tensor must be contiguous.
  TensorView reshape(std::initializer_list<std::int64_t> shape) const;
  /// A matrix whose rows are cut into `count` parts: [rows, count, width / count]. Rows may have gaps.
  TensorView split_rows(std::int64_t count) const;
  void set_stride(int i, std::int64_t stride) { strides_[i] = stride; }

  std::string describe() const;  // "bfloat16 [3, 576]", for messages

 private:
  void* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int ndim_ = 0;
  std::array<std::int64_t, kMaxDims> shape_{};
  std::array<std::int64_t, kMaxDims> strides_{};
};

}  // namespace flexcore
