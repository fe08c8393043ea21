#include <gtest/gtest.h>

#include "ops/cross_entropy.h"
#include "ops/linear.h"
#include "quantized_weight.h"

namespace flexcore::test {
namespace {

// Short last groups, odd extents, several ranges of k and of n, one row and many.
struct Shape {
  std::int64_t m, n, k;
};
const Shape kShapes[] = {{1, 1, 1},     {1, 17, 3},    {2, 16, 64},    {3, 33, 63},    {5, 48, 65},   {13, 15, 130},
                         {1, 192, 576}, {12, 160, 96}, {25, 33, 1030}, {40, 1100, 37}, {61, 96, 577}, {70, 31, 2100}};

class QuantizedLinearTest : public testing::TestWithParam<int> {
 protected:
  QuantizedWeight random_weight(const WeightFormat& format, DType dtype, std::int64_t n, std::int64_t k) {
    return {ops_, format, dtype, Matrix::random(DType::kFloat32, n, k, rng_)};
  }
  // Rows of the weight, as look-up reads them.
  Matrix rows_of(const WeightView& weight, DType dtype) {
    SharedVector<std::int32_t> ids;
    for (std::int64_t i = weight.out_features; i-- > 0;) ids.push_back(static_cast<std::int32_t>(i));
    Matrix rows(dtype, weight.out_features, weight.in_features, 1);
    ops_.run(EmbeddingArgs{TensorView(ids.data(), DType::kInt32, {weight.out_features}), weight, rows.view()});
    return rows;
  }
  void expect_worth(QuantizedWeight& weight, const std::string& what) {
    const Matrix rows = rows_of(weight.view(), DType::kFloat32);
    for (std::int64_t i = 0; i < weight.values.rows(); ++i)
      for (std::int64_t j = 0; j < weight.values.width(); ++j)
        ASSERT_EQ(rows(weight.values.rows() - 1 - i, j), weight.values(i, j))
            << what << ", " << format_name(weight.format) << " " << dtype_name(weight.values.dtype()) << ", row " << i
            << ", column " << j;
    EXPECT_TRUE(rows.gaps_untouched());
  }

  OpFixture ops_{GetParam()};
  std::mt19937 rng_{11};
};
INSTANTIATE_TEST_SUITE_P(Threads, QuantizedLinearTest, testing::Values(1, 3));

TEST_P(QuantizedLinearTest, IsWorthWhatPlainLoopsSay) {
  for (const auto& format : quantized_formats())
    for (const auto dtype : kFloats)
      for (const auto& [m, n, k] : kShapes) {
        auto weight = random_weight(format, dtype, n, k);
        expect_worth(weight, "normal numbers");
      }
}

TEST_P(QuantizedLinearTest, EverySourceDtypeGivesItsOwnValues) {
  for (const auto& format : quantized_formats()) {
    const auto source = Matrix::random(DType::kBFloat16, 19, 100, rng_);
    Matrix wide(DType::kFloat32, 19, 100);
    for (std::int64_t i = 0; i < 19; ++i)
      for (std::int64_t j = 0; j < 100; ++j) wide.set(i, j, static_cast<float>(source(i, j)));
    QuantizedWeight narrow(ops_, format, DType::kBFloat16, source), same(ops_, format, DType::kBFloat16, wide);
    EXPECT_EQ(narrow.bytes, same.bytes) << format_name(format);
    // float16 1, 2, 3, 4 and their halves, exact in every format's groups of one value.
    const std::uint16_t halves[] = {0x3c00, 0x4000, 0x4200, 0x4400};
    for (int h = 0; h < 4; ++h) {
      SharedVector<std::uint16_t> row(7, halves[h]);
      std::size_t size = 0;
      ops_.run(PackedWeightBytesArgs{1, 7, DType::kFloat32, &size, format});
      SharedVector<std::byte> packed(size);
      ops_.run(PackWeightArgs{TensorView(row.data(), DType::kFloat16, {1, 7}), DType::kFloat32, packed.data(), format});
      const Matrix rows = rows_of({packed.data(), DType::kFloat32, 1, 7, true, format}, DType::kFloat32);
      for (int j = 0; j < 7; ++j) EXPECT_EQ(rows(0, j), 1 + h) << format_name(format);
    }
  }
}

TEST_P(QuantizedLinearTest, ExtremeGroups) {
  for (const auto& format : quantized_formats()) {
    for (const auto dtype : kFloats) {
      Matrix source(DType::kFloat32, 6, 200);
      std::normal_distribution<float> normal(0.0f, 0.02f);
      for (std::int64_t j = 0; j < 200; ++j) {
        source.set(0, j, 0.0f);                                                   // no range at zero
        source.set(1, j, -0.375f);                                                // nor elsewhere
        source.set(2, j, j == 77 ? 1e30f : normal(rng_));                         // one that dwarfs the others
        source.set(3, j, (j % 2 ? -1.0f : 1.0f) * 2e38f);                         // wider than the largest float
        source.set(4, j, 1e-38f * static_cast<float>(j - 100));                   // subnormal steps
        source.set(5, j, j < 64 ? 5.0f : 5.0f + 0.001f * static_cast<float>(j));  // far from zero
      }
      QuantizedWeight weight(ops_, format, dtype, source);
      const Matrix rows = rows_of(weight.view(), DType::kFloat32);
      const std::int64_t last = 5;
      for (std::int64_t j = 0; j < 200; ++j) {
        EXPECT_EQ(rows(last - 0, j), 0) << format_name(format);
        EXPECT_EQ(rows(last - 1, j), -0.375) << format_name(format);
        for (std::int64_t i = 0; i < 6; ++i) EXPECT_TRUE(std::isfinite(rows(i, j))) << format_name(format) << " " << i;
        for (const std::int64_t i : {2, 5})
          EXPECT_EQ(rows(last - i, j), weight.values(i, j)) << format_name(format) << ", row " << i << ", " << j;
      }
    }
  }
}

// A quantised weight is a dense one that is stored otherwise: the same bits come out of every product.
TEST_P(QuantizedLinearTest, ProductsAreThoseOfTheDenseWeight) {
  for (const auto& format : quantized_formats()) {
    for (const auto weight_dtype : kFloats) {
      for (const auto& [m, n, k] : kShapes) {
        const DType dtype = m % 2 ? DType::kFloat32 : DType::kBFloat16;
        const bool accumulate = m % 3 == 0;
        auto weight = random_weight(format, weight_dtype, n, k), other = random_weight(format, weight_dtype, 21, k);
        auto x = Matrix::random(dtype, m, k, rng_, 1, 1), bias = Matrix::random(DType::kFloat32, 1, n, rng_);
        if (!on_cpu())  // the CUDA library takes a bias in the dtype of y
          for (std::int64_t j = 0; j < n; ++j)
            bias.set(0, j, dtype == DType::kFloat32 ? bias(0, j) : to_float(to_bfloat16(bias(0, j))));
        const Matrix y_before = accumulate ? Matrix::random(dtype, m, n, rng_, 1, 3) : Matrix(dtype, m, n, 3);
        const Matrix dx_before =
            accumulate ? Matrix::random(DType::kFloat32, m, k, rng_) : Matrix(DType::kFloat32, m, k);
        auto grad = Matrix::random(dtype, m, n, rng_), grad_2 = Matrix::random(dtype, m, 21, rng_);
        const GradMode mode = accumulate ? GradMode::kAccumulate : GradMode::kWrite;
        const auto products = [&](const WeightView& first, const WeightView& second) {
          Matrix y = y_before, y_2(DType::kFloat32, m, 21), dx = dx_before;
          const LinearArgs::Member members[] = {{first, bias.view().reshape({n}), y.view(), mode},
                                                {second, {}, y_2.view()}};
          ops_.run(LinearArgs{x.view(), members});
          const LinearBackwardArgs::Member back[] = {{first, grad.view()}, {second, grad_2.view()}};
          ops_.run(LinearBackwardArgs{back, dx.view(), mode});
          EXPECT_TRUE(y.gaps_untouched());
          return std::array{y, y_2, dx};
        };
        const auto got = products(weight.view(), other.view()), wanted = products(weight.dense(), other.dense());
        for (std::size_t i = 0; i < got.size(); ++i) {
          const auto where = [&] {
            return testing::Message() << "result " << i << ", " << format_name(format) << " "
                                      << dtype_name(weight_dtype) << ", " << m << " x " << n << " x " << k;
          };
          if (on_cpu())
            EXPECT_TRUE(got[i].same(wanted[i])) << where();
          else
            EXPECT_LT(worst_error(got[i], [&](auto r, auto c) { return wanted[i](r, c); }),
                      3 * epsilon(got[i].dtype()) + 4e-6 * std::sqrt(static_cast<double>(std::max(n, k))))
                << where();
        }
      }
    }
  }
}

// The bits of a row are those of the row alone.
TEST_P(QuantizedLinearTest, RowsDoNotDependOnTheBatch) {
  if (!on_cpu()) GTEST_SKIP() << "few rows have a kernel of their own there";
  OpFixture single(1);
  for (const auto& format : quantized_formats()) {
    for (const auto dtype : kFloats) {
      auto weight = random_weight(format, dtype, 100, 1100);
      auto x = Matrix::random(DType::kFloat32, 80, 1100, rng_), grad = Matrix::random(DType::kFloat32, 80, 100, rng_);
      Matrix y(DType::kFloat32, 80, 100), dx(DType::kFloat32, 80, 1100);
      for (std::int64_t i = 0; i < 80; ++i) {
        const LinearArgs::Member member{weight.view(), {}, y.view().rows(i, i + 1)};
        single.run(LinearArgs{x.view().rows(i, i + 1), {&member, 1}});
        const LinearBackwardArgs::Member back{weight.view(), grad.view().rows(i, i + 1)};
        single.run(LinearBackwardArgs{{&back, 1}, dx.view().rows(i, i + 1)});
      }
      for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 2}, {1, 4}, {3, 7}, {5, 18}, {0, 80}}) {
        Matrix some(DType::kFloat32, end - begin, 100), some_dx(DType::kFloat32, end - begin, 1100);
        const LinearArgs::Member member{weight.view(), {}, some.view()};
        ops_.run(LinearArgs{x.view().rows(begin, end), {&member, 1}});
        const LinearBackwardArgs::Member back{weight.view(), grad.view().rows(begin, end)};
        ops_.run(LinearBackwardArgs{{&back, 1}, some_dx.view()});
        for (std::int64_t i = begin; i < end; ++i) {
          ASSERT_TRUE(some.same_row(i - begin, y, i)) << format_name(format) << ", y, row " << i;
          ASSERT_TRUE(some_dx.same_row(i - begin, dx, i)) << format_name(format) << ", dx, row " << i;
        }
      }
    }
  }
}

TEST_P(QuantizedLinearTest, SizesAreWhatTheFormatsPromise) {
  const auto ratio = [&](WeightFormat::Kind kind) {
    std::size_t dense = 0, quantized = 0;
    ops_.run(PackedWeightBytesArgs{1536, 4096, DType::kBFloat16, &dense});
    ops_.run(PackedWeightBytesArgs{1536, 4096, DType::kBFloat16, &quantized, {kind, 64}});
    return static_cast<double>(quantized) / static_cast<double>(dense);
  };
  EXPECT_EQ(ratio(WeightFormat::Kind::kInt4), 0.28125);
  EXPECT_EQ(ratio(WeightFormat::Kind::kNf4), 0.28125);
  EXPECT_EQ(ratio(WeightFormat::Kind::kInt8), 0.53125);
}

TEST_P(QuantizedLinearTest, ChecksArguments) {
  auto weight = random_weight({WeightFormat::Kind::kInt4, 64}, DType::kFloat32, 8, 6);
  Matrix x(DType::kFloat32, 2, 6), y(DType::kFloat32, 2, 8);
  std::size_t size = 0;
  for (const std::int64_t group : {0, -16, 8, 40, 8192}) {
    const WeightFormat bad{WeightFormat::Kind::kNf4, group};
    EXPECT_THROW(ops_.run(PackedWeightBytesArgs{8, 6, DType::kFloat32, &size, bad}), InvalidArgument) << group;
    EXPECT_THROW(ops_.run(PackWeightArgs{x.view(), DType::kFloat32, y.floats(), bad}), InvalidArgument) << group;
  }
  EXPECT_THROW(weight.view().plain(), InvalidArgument);
  WeightView loose = weight.view();
  loose.packed = false;
  const LinearArgs::Member member{loose, {}, y.view()};
  EXPECT_THROW(ops_.run(LinearArgs{x.view(), {&member, 1}}), InvalidArgument);
  SharedVector<std::int32_t> labels = {0, 1};
  SharedVector<float> loss(2);
  EXPECT_THROW(ops_.run(LinearCrossEntropyArgs{x.view(), weight.view(), TensorView(labels.data(), DType::kInt32, {2}),
                                               TensorView(loss.data(), DType::kFloat32, {2})}),
               InvalidArgument);
  // No rows: nothing to do, no memory needed.
  const LinearArgs::Member none{weight.view(), {}, TensorView(nullptr, DType::kFloat32, {0, 8})};
  ops_.run(LinearArgs{TensorView(nullptr, DType::kFloat32, {0, 6}), {&none, 1}});
  const LinearBackwardArgs::Member back{weight.view(), TensorView(nullptr, DType::kBFloat16, {0, 8})};
  ops_.run(LinearBackwardArgs{{&back, 1}, TensorView(nullptr, DType::kFloat32, {0, 6})});
}

}  // namespace
}  // namespace flexcore::test
