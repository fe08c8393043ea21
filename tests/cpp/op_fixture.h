#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string_view>
#include <vector>

#include "core/bfloat16.h"
#include "memory/arena.h"
#include "ops/registry.h"
#include "test_device.h"

namespace flexcore::test {

/// Memory of test data: both the test and the device's kernels see it.
template <class T>
struct SharedMemory {
  using value_type = T;
  SharedMemory() = default;
  template <class U>
  SharedMemory(const SharedMemory<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(test_runtime().pinned().allocate(count * sizeof(T))); }
  void deallocate(T* data, std::size_t count) { test_runtime().pinned().deallocate(data, count * sizeof(T)); }
  bool operator==(const SharedMemory&) const { return true; }
};
template <class T>
using SharedVector = std::vector<T, SharedMemory<T>>;

/// What an op needs to run on the test's device: its own pool, scratch and registry.
class OpFixture {
 public:
  explicit OpFixture(int num_threads) : threads_(num_threads) {
    context_.registry = &registry_;
    context_.device = test_device();
    context_.threads = &threads_;
    context_.scratch = &scratch_;
    context_.stream = test_runtime().stream();
  }
  template <class Args>
  void run(const Args& args) {
    flexcore::run(context_, args);
    test_runtime().synchronize();
  }
  OpContext& context() { return context_; }

 private:
  MemoryLedger ledger_;
  Arena scratch_{test_runtime().allocator(), ledger_};
  ThreadPool threads_;
  OpRegistry registry_ = make_op_registry();
  OpContext context_;
};

/// A matrix of float32 or bfloat16 whose rows lie `gap` elements apart. Starts poisoned: NaN everywhere.
class Matrix {
 public:
  Matrix(DType dtype, std::int64_t rows, std::int64_t width, std::int64_t gap = 0)
      : dtype_(dtype), rows_(rows), width_(width), stride_(width + gap), bytes_(rows * stride_ * dtype_size(dtype)) {
    for (std::int64_t i = 0; i < rows * stride_; ++i) put(i, std::numeric_limits<float>::quiet_NaN());
  }
  /// Normal numbers, rounded to the dtype.
  static Matrix random(DType dtype, std::int64_t rows, std::int64_t width, std::mt19937& rng, float scale = 1.0f,
                       std::int64_t gap = 0) {
    Matrix m(dtype, rows, width, gap);
    std::normal_distribution<float> normal(0.0f, scale);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < width; ++j) m.set(i, j, normal(rng));
    return m;
  }

  TensorView view() {
    TensorView v(bytes_.data(), dtype_, {rows_, width_});
    v.set_stride(0, stride_);
    return v;
  }
  double operator()(std::int64_t i, std::int64_t j) const { return get(i * stride_ + j); }
  void set(std::int64_t i, std::int64_t j, float x) { put(i * stride_ + j, x); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  DType dtype() const { return dtype_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t width() const { return width_; }

  bool same_row(std::int64_t i, const Matrix& other, std::int64_t j) const {
    const auto size = dtype_size(dtype_);
    return width_ == 0 || std::memcmp(bytes_.data() + i * stride_ * size,
                                      other.bytes_.data() + j * other.stride_ * size, width_ * size) == 0;
  }
  bool same(const Matrix& other) const {
    for (std::int64_t i = 0; i < rows_; ++i)
      if (!same_row(i, other, i)) return false;
    return rows_ == other.rows_ && width_ == other.width_;
  }
  /// Whether nothing was written between the rows.
  bool gaps_untouched() const {
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = width_; j < stride_; ++j)
        if (!std::isnan(get(i * stride_ + j))) return false;
    return true;
  }

 private:
  double get(std::int64_t i) const {
    const auto* p = bytes_.data();
    return dtype_ == DType::kBFloat16 ? to_float(reinterpret_cast<const bfloat16*>(p)[i])
                                      : reinterpret_cast<const float*>(p)[i];
  }
  void put(std::int64_t i, float x) {
    if (dtype_ == DType::kBFloat16)
      reinterpret_cast<bfloat16*>(bytes_.data())[i] = to_bfloat16(x);
    else
      floats()[i] = x;
  }

  DType dtype_;
  std::int64_t rows_, width_, stride_;
  SharedVector<std::byte> bytes_;
};

inline constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16};

/// Relative spacing of the results: what one rounding may cost.
inline double epsilon(DType dtype) { return dtype == DType::kBFloat16 ? 1.0 / 256 : 2e-6; }

/// Largest |got - wanted| / (1 + |wanted|) over a matrix; NaN counts as infinite.
template <class Wanted>
double worst_error(const Matrix& got, Wanted&& wanted) {
  double worst = 0;
  for (std::int64_t i = 0; i < got.rows(); ++i) {
    for (std::int64_t j = 0; j < got.width(); ++j) {
      const double w = wanted(i, j), error = std::abs(got(i, j) - w) / (1 + std::abs(w));
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  }
  return worst;
}

}  // namespace flexcore::test
