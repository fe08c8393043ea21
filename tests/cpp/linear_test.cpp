#include "ops/linear.h"

#include <gtest/gtest.h>

#include <memory>

#include "backends/cpu/packed_weight.h"
#include "op_fixture.h"
#include "ops/rows.h"

namespace flexcore::test {
namespace {

// A weight in both forms. `values` are rounded to the dtype.
struct Weight {
  Weight(OpFixture& ops, DType dtype, std::int64_t n, std::int64_t k, std::mt19937& rng)
      : values(Matrix::random(dtype, n, k, rng)) {
    std::size_t size = 0;
    ops.run(PackedWeightBytesArgs{n, k, dtype, &size});
    bytes.assign(size, std::byte{0xff});
    ops.run(PackWeightArgs{values.view(), dtype, bytes.data()});
  }
  WeightView view(bool packed) {
    return {packed ? bytes.data() : values.view().data(), values.dtype(), values.rows(), values.width(), packed};
  }

  Matrix values;
  SharedVector<std::byte> bytes;  // 64-byte aligned, as all of the allocators' memory
};

// What an operand is worth once it has the weight's dtype.
double rounded(double x, DType weight) {
  return weight == DType::kBFloat16 ? to_float(to_bfloat16(static_cast<float>(x))) : x;
}

// Sums of k products of normal numbers: errors grow with their size, which is about sqrt(k).
double tolerance(DType y, std::int64_t k) { return epsilon(y) + 2e-6 * std::sqrt(static_cast<double>(k)); }

struct Shape {
  std::int64_t m, n, k;
};
// Multiples and not of pairs, panels, tiles and ranges; one of everything; several ranges of k and of n.
const Shape kShapes[] = {{1, 1, 1},     {1, 16, 2},    {2, 17, 3},    {3, 64, 33},   {5, 48, 64},
                         {6, 31, 7},    {7, 100, 50},  {13, 15, 9},   {12, 160, 96}, {25, 33, 1030},
                         {40, 700, 37}, {61, 96, 577}, {130, 70, 70}, {1, 192, 576}};

class LinearTest : public testing::TestWithParam<int> {
 protected:
  OpFixture ops_{GetParam()};
  std::mt19937 rng_{7};
};
INSTANTIATE_TEST_SUITE_P(Threads, LinearTest, testing::Values(1, 3));

TEST_P(LinearTest, ForwardMatchesReference) {
  for (const auto weight_dtype : kFloats) {
    for (const auto dtype : kFloats) {
      for (const auto& [m, n, k] : kShapes) {
        for (const int form : {0, 1, 2, 3}) {
          const bool packed = form & 1, accumulate = form & 2;
          Weight weight(ops_, weight_dtype, n, k, rng_);
          auto x = Matrix::random(dtype, m, k, rng_, 1, form);
          auto bias = Matrix::random(DType::kFloat32, 1, n, rng_);
          // The CUDA library takes a bias in the dtype of y.
          if (!on_cpu())
            for (std::int64_t j = 0; j < n; ++j) bias.set(0, j, static_cast<float>(rounded(bias(0, j), dtype)));
          auto y = accumulate ? Matrix::random(dtype, m, n, rng_, 1, 3) : Matrix(dtype, m, n, 3);
          const Matrix before = y;
          const LinearArgs::Member member{weight.view(packed), form == 0 ? TensorView() : bias.view().reshape({n}),
                                          y.view(), accumulate ? GradMode::kAccumulate : GradMode::kWrite};
          ops_.run(LinearArgs{x.view(), {&member, 1}});
          const auto wanted = [&](std::int64_t i, std::int64_t j) {
            double sum = (form == 0 ? 0 : bias(0, j)) + (accumulate ? before(i, j) : 0);
            for (std::int64_t l = 0; l < k; ++l) sum += rounded(x(i, l), weight_dtype) * weight.values(j, l);
            return sum;
          };
          // The CUDA library rounds a product to bfloat16 before it adds y and the bias, and then the sum.
          const bool rounded_twice = !on_cpu() && form > 0 && dtype == DType::kBFloat16;
          EXPECT_LT(worst_error(y, wanted), tolerance(dtype, k) * (rounded_twice ? 3 : 1))
              << m << " x " << n << " x " << k << ", form " << form << ", " << dtype_name(weight_dtype) << " weight, "
              << dtype_name(dtype) << " rows";
          EXPECT_TRUE(y.gaps_untouched());
        }
      }
    }
  }
}

TEST_P(LinearTest, MembersShareX) {
  for (const auto dtype : kFloats) {
    Weight q(ops_, dtype, 80, 70, rng_), k(ops_, dtype, 17, 70, rng_), v(ops_, DType::kFloat32, 33, 70, rng_);
    for (const std::int64_t m : {1, 9, 70}) {
      auto x = Matrix::random(DType::kFloat32, m, 70, rng_);
      std::vector<Matrix> together, alone;
      std::vector<LinearArgs::Member> members;
      Weight* const weights[] = {&q, &k, &v};
      for (auto* w : weights) {
        together.emplace_back(DType::kFloat32, m, w->values.rows());
        alone.emplace_back(DType::kFloat32, m, w->values.rows());
      }
      for (int i = 0; i < 3; ++i) members.push_back({weights[i]->view(true), {}, together[i].view()});
      ops_.run(LinearArgs{x.view(), members});
      for (int i = 0; i < 3; ++i) {
        const LinearArgs::Member member{weights[i]->view(true), {}, alone[i].view()};
        ops_.run(LinearArgs{x.view(), {&member, 1}});
        EXPECT_TRUE(together[i].same(alone[i])) << "member " << i << ", " << m << " rows";
      }
    }
  }
}

// The bits of a row are those of the row alone, whatever the batch, its place in it, the threads and the weight's form.
TEST_P(LinearTest, RowsDoNotDependOnTheBatch) {
  OpFixture single(1);
  for (const auto weight_dtype : kFloats) {
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{70, 45}, {192, 576}, {100, 1100}}) {
      Weight weight(ops_, weight_dtype, n, k, rng_);
      auto x = Matrix::random(DType::kFloat32, 150, k, rng_), grad = Matrix::random(DType::kFloat32, 150, n, rng_);
      auto bias = Matrix::random(DType::kFloat32, 1, n, rng_);
      Matrix y(DType::kFloat32, 150, n), dx(DType::kFloat32, 150, k);
      for (std::int64_t i = 0; i < 150; ++i) {
        const LinearArgs::Member member{weight.view(true), bias.view().reshape({n}), y.view().rows(i, i + 1)};
        single.run(LinearArgs{x.view().rows(i, i + 1), {&member, 1}});
        const LinearBackwardArgs::Member back{weight.view(true), grad.view().rows(i, i + 1)};
        single.run(LinearBackwardArgs{{&back, 1}, dx.view().rows(i, i + 1)});
      }
      for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 2},
                                       {3, 6},
                                       {1, 5},
                                       {0, 5},
                                       {2, 8},
                                       {1, 8},
                                       {5, 13},
                                       {4, 15},
                                       {0, 12},
                                       {0, 13},
                                       {7, 31},
                                       {0, 64},
                                       {1, 150},
                                       {0, 150}}) {
        for (const bool packed : {true, false}) {
          Matrix some(DType::kFloat32, end - begin, n), some_dx(DType::kFloat32, end - begin, k);
          const LinearArgs::Member member{weight.view(packed), bias.view().reshape({n}), some.view()};
          ops_.run(LinearArgs{x.view().rows(begin, end), {&member, 1}});
          const LinearBackwardArgs::Member back{weight.view(packed), grad.view().rows(begin, end)};
          ops_.run(LinearBackwardArgs{{&back, 1}, some_dx.view()});
          for (std::int64_t i = begin; i < end; ++i) {
            ASSERT_TRUE(some.same_row(i - begin, y, i))
                << "y, row " << i << " of [" << begin << ", " << end << "), k " << k;
            ASSERT_TRUE(some_dx.same_row(i - begin, dx, i))
                << "dx, row " << i << " of [" << begin << ", " << end << ")";
          }
        }
      }
    }
  }
}

TEST_P(LinearTest, BackwardMatchesReference) {
  for (const auto weight_dtype : kFloats) {
    for (const auto dtype : kFloats) {
      for (const auto& [m, n, k] : kShapes) {
        for (const int form : {0, 1, 2, 3}) {
          const bool packed = form & 1, accumulate = form & 2;
          Weight first(ops_, weight_dtype, n, k, rng_), second(ops_, weight_dtype, 21, k, rng_);
          auto grad_1 = Matrix::random(dtype, m, n, rng_, 1, form), grad_2 = Matrix::random(dtype, m, 21, rng_);
          auto grad_x =
              accumulate ? Matrix::random(DType::kFloat32, m, k, rng_, 1, 3) : Matrix(DType::kFloat32, m, k, 3);
          const Matrix before = grad_x;
          const LinearBackwardArgs::Member members[] = {{first.view(packed), grad_1.view()},
                                                        {second.view(true), grad_2.view()}};
          ops_.run(LinearBackwardArgs{members, grad_x.view(), accumulate ? GradMode::kAccumulate : GradMode::kWrite});
          const auto wanted = [&](std::int64_t i, std::int64_t j) {
            double sum = accumulate ? before(i, j) : 0;
            for (std::int64_t l = 0; l < n; ++l) sum += rounded(grad_1(i, l), weight_dtype) * first.values(l, j);
            for (std::int64_t l = 0; l < 21; ++l) sum += rounded(grad_2(i, l), weight_dtype) * second.values(l, j);
            return sum;
          };
          EXPECT_LT(worst_error(grad_x, wanted), tolerance(DType::kFloat32, n + 21))
              << m << " x " << n << " x " << k << ", form " << form << ", " << dtype_name(weight_dtype) << " weight";
          EXPECT_TRUE(grad_x.gaps_untouched());
        }
      }
    }
  }
}

TEST_P(LinearTest, EmbeddingReadsTheSameBytes) {
  for (const auto weight_dtype : kFloats) {
    for (const auto dtype : kFloats) {
      Weight weight(ops_, weight_dtype, 83, 37, rng_);
      SharedVector<std::int32_t> ids = {0, 82, 15, 16, 17, 31, 32, 80, 0};
      for (const bool packed : {true, false}) {
        Matrix y(dtype, 9, 37, 2);
        ops_.run(EmbeddingArgs{TensorView(ids.data(), DType::kInt32, {9}), weight.view(packed), y.view()});
        EXPECT_EQ(worst_error(y, [&](auto i, auto j) { return rounded(weight.values(ids[i], j), dtype); }), 0);
        EXPECT_TRUE(y.gaps_untouched());
      }
      ids[3] = 83;
      Matrix y(dtype, 9, 37);
      const EmbeddingArgs outside{TensorView(ids.data(), DType::kInt32, {9}), weight.view(true), y.view()};
      if (on_cpu()) {
        EXPECT_THROW(ops_.run(outside), InvalidArgument);
      } else {
        ops_.run(outside);
        EXPECT_TRUE(std::isnan(y(3, 0)) && !std::isnan(y(4, 0)));
      }
    }
  }
}

TEST_P(LinearTest, RowsOfAPackedWeightAreAWeight) {
  if (!on_cpu()) GTEST_SKIP() << "panels are the CPU's layout";
  for (const auto dtype : kFloats) {
    Weight weight(ops_, dtype, 100, 51, rng_);
    auto x = Matrix::random(DType::kFloat32, 4, 51, rng_);
    Matrix all(DType::kFloat32, 4, 100), some(DType::kFloat32, 4, 43);
    const LinearArgs::Member whole{weight.view(true), {}, all.view()};
    const LinearArgs::Member part{cpu::weight_rows(weight.view(true), 48, 91), {}, some.view()};
    ops_.run(LinearArgs{x.view(), {&whole, 1}});
    ops_.run(LinearArgs{x.view(), {&part, 1}});
    for (std::int64_t i = 0; i < 4; ++i)
      for (std::int64_t j = 0; j < 43; ++j) EXPECT_EQ(some(i, j), all(i, j + 48));
    EXPECT_THROW(cpu::weight_rows(weight.view(true), 8, 91), InvalidArgument);
  }
}

TEST_P(LinearTest, PacksFloat16) {
  // Largest, smallest normal, subnormals, infinity, signed zero, one.
  const std::uint16_t halves[] = {0x7bff, 0x0400, 0x0001, 0x83ff, 0x7c00, 0x8000, 0x3c00, 0xc000};
  const float wanted[] = {65504.0f, 0x1p-14f, 0x1p-24f, -0x1.ff8p-15f, std::numeric_limits<float>::infinity(),
                          -0.0f,    1.0f,     -2.0f};
  SharedVector<float> packed(8 * 16);
  ops_.run(PackWeightArgs{TensorView(const_cast<std::uint16_t*>(halves), DType::kFloat16, {1, 8}), DType::kFloat32,
                          packed.data()});
  Matrix y(DType::kFloat32, 1, 8);
  SharedVector<std::int32_t> id = {0};
  ops_.run(
      EmbeddingArgs{TensorView(id.data(), DType::kInt32, {1}), {packed.data(), DType::kFloat32, 1, 8, true}, y.view()});
  EXPECT_EQ(std::memcmp(y.floats(), wanted, sizeof wanted), 0);
}

TEST_P(LinearTest, PacksWhatIsOnTheDevice) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const auto& [rows, width] : {std::pair(1, 5), std::pair(37, 64), std::pair(130, 33)}) {
      Weight weight(ops_, dtype, rows, width, rng_);
      Matrix values = Matrix::random(DType::kFloat32, rows, width, rng_);
      SharedVector<std::byte> packed(weight.bytes.size(), std::byte{0xff});
      ops_.run(PackWeightArgs{.source = values.view(), .dtype = dtype, .packed = weight.bytes.data()});
      ops_.run(PackWeightArgs{.source = values.view(), .dtype = dtype, .packed = packed.data(), .on_device = true});
      EXPECT_EQ(packed, weight.bytes) << rows << " x " << width;
    }
}

TEST_P(LinearTest, ChecksArguments) {
  Weight weight(ops_, DType::kFloat32, 8, 6, rng_);
  Matrix x(DType::kFloat32, 2, 6), wrong(DType::kFloat32, 2, 7), y(DType::kFloat32, 2, 8), bias(DType::kFloat32, 1, 7);
  const auto run = [&](const TensorView& input, const LinearArgs::Member& member) {
    ops_.run(LinearArgs{input, {&member, 1}});
  };
  EXPECT_THROW(run(wrong.view(), {weight.view(true), {}, y.view()}), InvalidArgument);
  EXPECT_THROW(run(x.view(), {weight.view(true), {}, wrong.view()}), InvalidArgument);
  EXPECT_THROW(run(x.view(), {weight.view(true), bias.view().reshape({7}), y.view()}), InvalidArgument);
  EXPECT_THROW(run(x.view(), {WeightView{nullptr, DType::kFloat32, 8, 6, true}, {}, y.view()}), InvalidArgument);
  EXPECT_THROW(ops_.run(LinearBackwardArgs{{}, x.view()}), InvalidArgument);
  EXPECT_THROW(ops_.run(PackWeightArgs{x.view(), DType::kInt32, y.floats()}), InvalidArgument);
  TensorView strided(y.floats(), DType::kFloat32, {2, 6});
  strided.set_stride(0, 8);
  EXPECT_THROW(ops_.run(PackWeightArgs{.source = strided, .packed = x.floats(), .on_device = true}), InvalidArgument);
  EXPECT_THROW(weight.view(true).plain(), InvalidArgument);
  // No rows: nothing to do, no memory needed.
  const LinearArgs::Member none{weight.view(true), {}, TensorView(nullptr, DType::kFloat32, {0, 8})};
  ops_.run(LinearArgs{TensorView(nullptr, DType::kFloat32, {0, 6}), {&none, 1}});
  const LinearBackwardArgs::Member back{weight.view(true), TensorView(nullptr, DType::kBFloat16, {0, 8})};
  ops_.run(LinearBackwardArgs{{&back, 1}, TensorView(nullptr, DType::kFloat32, {0, 6})});
}

}  // namespace
}  // namespace flexcore::test
