#include "ops/product.h"

#include <gtest/gtest.h>

#include "op_fixture.h"
#include "ops/cross_entropy.h"
#include "ops/table.h"

namespace flexcore::test {
namespace {

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

struct Shape {
  std::int64_t m, n, k;
};
const Shape kShapes[] = {{1, 1, 1}, {3, 5, 2}, {97, 8, 33}, {8, 530, 17}, {130, 24, 1}, {5, 7, 0}};

TEST(Product, MatchesOracleInEveryOrientation) {
  std::mt19937 rng(1);
  for (const auto& [m, n, k] : kShapes)
    for (const bool transpose_a : {false, true})
      for (const bool transpose_b : {false, true})
        for (const auto mode : {GradMode::kWrite, GradMode::kAccumulate}) {
          if (k == 0 && (transpose_a || transpose_b)) continue;
          auto a = Matrix::random(DType::kFloat32, transpose_a ? k : m, transpose_a ? m : k, rng, 1.0f, 3);
          auto b = Matrix::random(DType::kFloat32, transpose_b ? n : k, transpose_b ? k : n, rng, 1.0f, 1);
          auto c = mode == GradMode::kWrite ? Matrix(DType::kFloat32, m, n, 2)
                                            : Matrix::random(DType::kFloat32, m, n, rng, 1.0f, 2);
          const Matrix before = c;
          fixture().run(ProductArgs{.a = a.view(),
                                    .b = b.view(),
                                    .c = c.view(),
                                    .alpha = 0.75f,
                                    .transpose_a = transpose_a,
                                    .transpose_b = transpose_b,
                                    .mode = mode});
          const auto wanted = [&](auto i, auto j) {
            double sum = 0;
            for (std::int64_t l = 0; l < k; ++l)
              sum += (transpose_a ? a(l, i) : a(i, l)) * (transpose_b ? b(j, l) : b(l, j));
            return 0.75 * sum + (mode == GradMode::kAccumulate ? before(i, j) : 0.0);
          };
          EXPECT_LE(worst_error(c, wanted), 1e-5) << m << " " << n << " " << k << " " << transpose_a << transpose_b;
          EXPECT_TRUE(c.gaps_untouched());
        }
}

TEST(Product, RefusesShapesThatDoNotMeet) {
  Matrix a(DType::kFloat32, 3, 4), b(DType::kFloat32, 5, 6), c(DType::kFloat32, 3, 6), half(DType::kBFloat16, 4, 6);
  const auto refusal = [&](Matrix& second) {
    try {
      fixture().run(ProductArgs{.a = a.view(), .b = second.view(), .c = c.view()});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  EXPECT_EQ(refusal(b), "product: b is float32 [5, 6], wanted 4 rows");
  EXPECT_EQ(refusal(half), "product: b is bfloat16 [4, 6], wanted float32");
}

// As a whole embedding lies in memory, and as the A of a LoRA does.
TEST(Table, LooksUpAndAddsInEitherLayout) {
  std::mt19937 rng(2);
  constexpr std::int64_t kTokens = 11;
  for (const std::int64_t width : {1, 8, 33, 300})
    for (const bool turned : {false, true})
      for (const std::int64_t rows : {0, 1, 29}) {
        auto values = Matrix::random(DType::kFloat32, turned ? width : kTokens, turned ? kTokens : width, rng);
        const Matrix before = values;
        const auto at = [&](const Matrix& m, std::int64_t token, std::int64_t j) {
          return turned ? m(j, token) : m(token, j);
        };
        const TokenTable table{values.floats(), kTokens, width, turned ? 1 : width, turned ? kTokens : 1};
        SharedVector<std::int32_t> ids(static_cast<std::size_t>(rows));
        for (auto& id : ids) id = static_cast<std::int32_t>(rng() % kTokens);
        const TensorView tokens(ids.data(), DType::kInt32, {rows});
        Matrix y(DType::kFloat32, rows, width, 3);
        fixture().run(TableLookUpArgs{tokens, table, y.view()});
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < width; ++j) ASSERT_EQ(y(i, j), at(before, ids[static_cast<std::size_t>(i)], j));
        EXPECT_TRUE(y.gaps_untouched());

        auto x = Matrix::random(DType::kFloat32, rows, width, rng, 1.0f, 1);
        fixture().run(TableAddArgs{tokens, x.view(), table});
        for (std::int64_t token = 0; token < kTokens; ++token)
          for (std::int64_t j = 0; j < width; ++j) {
            float wanted = static_cast<float>(at(before, token, j));
            for (std::int64_t i = 0; i < rows; ++i)  // in this order, to the last bit
              if (ids[static_cast<std::size_t>(i)] == token) wanted += static_cast<float>(x(i, j));
            ASSERT_EQ(at(values, token, j), wanted);
          }
      }
}

TEST(LogitCrossEntropy, MatchesOracleInPlace) {
  std::mt19937 rng(3);
  for (const std::int64_t rows : {0, 1, 7})
    for (const std::int64_t vocab : {1, 5, 257, 3001})
      for (const float size : {1.0f, 40.0f}) {
        auto logits = Matrix::random(DType::kFloat32, rows, vocab, rng, size, 2);
        Matrix loss_only = logits;
        const Matrix before = logits;
        auto scale = Matrix::random(DType::kFloat32, 1, rows, rng);
        Matrix loss(DType::kFloat32, 1, rows), again = loss;
        SharedVector<std::int32_t> labels(static_cast<std::size_t>(rows));
        for (auto& label : labels) label = static_cast<std::int32_t>(rng() % static_cast<std::uint32_t>(vocab));
        const TensorView label_view(labels.data(), DType::kInt32, {rows});
        fixture().run(
            CrossEntropyArgs{logits.view(), label_view, loss.view().reshape({rows}), scale.view().reshape({rows})});
        for (std::int64_t i = 0; i < rows; ++i) {
          const auto label = labels[static_cast<std::size_t>(i)];
          double top = -1e300, sum = 0;
          for (std::int64_t v = 0; v < vocab; ++v) top = std::max(top, before(i, v));
          for (std::int64_t v = 0; v < vocab; ++v) sum += std::exp(before(i, v) - top);
          EXPECT_NEAR(loss(0, i), top + std::log(sum) - before(i, label), 1e-5 * (1 + std::abs(top)));
          for (std::int64_t v = 0; v < vocab; ++v) {
            const double p = std::exp(before(i, v) - top) / sum;
            ASSERT_NEAR(logits(i, v), scale(0, i) * (p - (v == label ? 1 : 0)), 1e-5);
          }
        }
        EXPECT_TRUE(logits.gaps_untouched());
        fixture().run(CrossEntropyArgs{loss_only.view(), label_view, again.view().reshape({rows}), {}});
        EXPECT_TRUE(again.same(loss));
      }
}

}  // namespace
}  // namespace flexcore::test
