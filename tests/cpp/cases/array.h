#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "core/bfloat16.h"
#include "memory/buffer.h"
#include "ops/weight.h"

namespace flexcore::cases {

/// Numbers as a function of their index, uniform with mean 0 and deviation `scale`: what was packed, or is too large to
/// keep, can be asked for again.
struct Noise {
  std::uint64_t seed = 0;
  float scale = 1.0f;

  float operator()(std::int64_t index) const {
    std::uint64_t z = (static_cast<std::uint64_t>(index) + (seed << 40)) * 0x9e3779b97f4a7c15u;  // splitmix64's mixing
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z ^= z >> 27;
    const auto whole = static_cast<std::int32_t>(z >> 32);
    return static_cast<float>(whole) * (1.7320508f * 0x1p-31f) * scale;
  }
  double rounded(std::int64_t index, DType dtype) const {
    const float x = (*this)(index);
    return dtype == DType::kBFloat16 ? to_float(to_bfloat16(x)) : x;
  }
};

/// Where arrays lie: the host's memory, memory that host and device both reach (then results can be checked), or the
/// device's own (then they can only be timed).
inline Allocator*& array_allocator() {
  static Allocator* allocator = &host_allocator();
  return allocator;
}

/// Owns a contiguous array of float32 or bfloat16.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::initializer_list<std::int64_t> shape) : Array(dtype, shape, kNan) {}
  Array(DType dtype, std::initializer_list<std::int64_t> shape, float value) : Array(shape, dtype) {
    fill([value](std::int64_t) { return value; });
  }
  Array(DType dtype, std::initializer_list<std::int64_t> shape, Noise noise) : Array(shape, dtype) { fill(noise); }

  TensorView view() const { return view_; }
  std::int64_t size() const { return view_.size(); }
  float* floats() const { return view_.as<float>(); }
  double operator[](std::int64_t i) const {
    return view_.dtype() == DType::kBFloat16 ? to_float(view_.as<bfloat16>()[i]) : view_.as<float>()[i];
  }
  double at(std::int64_t row, std::int64_t column) const { return (*this)[row * view_.stride(0) + column]; }

  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

 private:
  friend class Integers;
  friend class PackedNoise;

  Array(std::initializer_list<std::int64_t> shape, DType dtype, Allocator& allocator = *array_allocator()) {
    std::int64_t count = 1;
    for (const auto extent : shape) count *= extent;
    buffer_ = Buffer(allocator, ledger(), MemoryTag::kWorkspace, static_cast<std::size_t>(count) * dtype_size(dtype));
    view_ = buffer_.view(dtype, shape);
  }
  static MemoryLedger& ledger() {
    static MemoryLedger all;
    return all;
  }
  template <class F>
  void fill(F&& value) {
    const std::int64_t count = view_.size();
    const bool elsewhere = buffer_.allocator().device().kind != DeviceKind::kCpu;
    const Buffer made = elsewhere ? Buffer(host_allocator(), ledger(), MemoryTag::kWorkspace, view_.bytes()) : Buffer();
    std::byte* const to = elsewhere ? made.data() : buffer_.data();
    if (view_.dtype() == DType::kBFloat16)
      for (std::int64_t i = 0; i < count; ++i) reinterpret_cast<bfloat16*>(to)[i] = to_bfloat16(value(i));
    else
      for (std::int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(to)[i] = value(i);
    if (elsewhere) buffer_.allocator().upload(buffer_.data(), to, view_.bytes());
  }

  Buffer buffer_;
  TensorView view_;
};

/// Owns a vector of int32, where arrays lie.
class Integers {
 public:
  explicit Integers(const std::vector<std::int32_t>& values)
      : bytes_({static_cast<std::int64_t>(values.size())}, DType::kFloat32) {
    bytes_.buffer_.allocator().upload(view().data(), values.data(), view().bytes());
  }
  TensorView view() const { return TensorView(bytes_.view().data(), DType::kInt32, {bytes_.size()}); }

 private:
  Array bytes_;
};

/// A packed weight [out_features, in_features] of noise that keeps products of unit rows near one.
class PackedNoise {
 public:
  PackedNoise(OpContext& context, DType dtype, std::int64_t out_features, std::int64_t in_features, std::uint64_t seed)
      : noise{seed, 1.0f / std::sqrt(static_cast<float>(in_features))} {
    Array source({out_features, in_features}, dtype, host_allocator());
    source.fill(noise);
    std::size_t size = 0;
    run(context, PackedWeightBytesArgs{out_features, in_features, dtype, &size});
    bytes_ = Array(DType::kFloat32, {static_cast<std::int64_t>((size + 3) / 4)}, 0.0f);
    run(context, PackWeightArgs{source.view(), dtype, bytes_.view().data()});
    view_ = {bytes_.view().data(), dtype, out_features, in_features, true};
  }
  WeightView view() const { return view_; }
  double at(std::int64_t row, std::int64_t column) const {
    return noise.rounded(row * view_.in_features + column, view_.dtype);
  }

 private:
  Noise noise;
  Array bytes_;
  WeightView view_;
};

/// What rounding a result to the dtype may cost, relative.
inline double epsilon(DType dtype) { return dtype == DType::kBFloat16 ? 1.0 / 200 : 1e-5; }

inline double size_of(DType dtype) { return static_cast<double>(dtype_size(dtype)); }

/// `count` indices spread over [0, size), the first and last among them.
template <class F>
void sample(std::int64_t size, std::int64_t count, F&& visit) {
  if (size <= count) {
    for (std::int64_t i = 0; i < size; ++i) visit(i);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) visit(i * (size - 1) / (count - 1));
}

}  // namespace flexcore::cases
