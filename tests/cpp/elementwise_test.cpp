#include <gtest/gtest.h>

#include <numeric>

#include "op_fixture.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/rows.h"
#include "ops/silu_mul.h"

namespace flexcore::test {
namespace {

constexpr std::int64_t kWidths[] = {1, 3, 8, 17, 64, 97, 576};

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(RmsNorm, MatchesOracleForEveryDtypeAndWidth) {
  std::mt19937 rng(1);
  for (const auto width : kWidths)
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        auto x = Matrix::random(x_type, 5, width, rng, 2.0f, 3),
             weight = Matrix::random(DType::kFloat32, 1, width, rng);
        Matrix y(y_type, 5, width, 5);
        fixture().run(RmsNormArgs{x.view(), weight.view().reshape({width}), y.view(), 1e-5f});
        const auto wanted = [&](auto i, auto j) {
          double squares = 0;
          for (std::int64_t k = 0; k < width; ++k) squares += x(i, k) * x(i, k);
          return x(i, j) / std::sqrt(squares / width + 1e-5) * weight(0, j);
        };
        EXPECT_LE(worst_error(y, wanted), epsilon(y_type)) << width;
        EXPECT_TRUE(y.gaps_untouched());
        if (x_type != y_type) continue;
        fixture().run(RmsNormArgs{x.view(), weight.view().reshape({width}), x.view(), 1e-5f});
        EXPECT_TRUE(x.same(y)) << "in place, width " << width;
      }
}

TEST(RmsNorm, BackwardMatchesOracle) {
  std::mt19937 rng(2);
  for (const auto width : kWidths)
    for (const auto g_type : kFloats)
      for (const auto x_type : kFloats)
        for (const auto d_type : kFloats)
          for (const auto mode : {GradMode::kWrite, GradMode::kAccumulate}) {
            auto g = Matrix::random(g_type, 4, width, rng, 1.0f, 2), x = Matrix::random(x_type, 4, width, rng);
            auto weight = Matrix::random(DType::kFloat32, 1, width, rng);
            auto before = Matrix::random(d_type, 4, width, rng), d = before;
            if (mode == GradMode::kWrite) d = Matrix(d_type, 4, width);
            fixture().run(
                RmsNormBackwardArgs{g.view(), x.view(), weight.view().reshape({width}), d.view(), 1e-5f, mode});
            const auto wanted = [&](auto i, auto j) {
              double squares = 0, product = 0;
              for (std::int64_t k = 0; k < width; ++k) {
                squares += x(i, k) * x(i, k);
                product += g(i, k) * weight(0, k) * x(i, k);
              }
              const double r = 1 / std::sqrt(squares / width + 1e-5);
              const double grad = r * (g(i, j) * weight(0, j) - x(i, j) * r * r * product / width);
              return grad + (mode == GradMode::kAccumulate ? before(i, j) : 0);
            };
            EXPECT_LE(worst_error(d, wanted), 4 * epsilon(d_type)) << width;
            if (mode == GradMode::kAccumulate || g_type != d_type) continue;
            fixture().run(
                RmsNormBackwardArgs{g.view(), x.view(), weight.view().reshape({width}), g.view(), 1e-5f, mode});
            EXPECT_TRUE(g.same(d)) << "in place, width " << width;
          }
}

// The other widths are odd on purpose; these let every access be a vector.
TEST(RmsNorm, AnyMultipleOfEight) {
  std::mt19937 rng(8);
  std::vector<std::int64_t> widths = {1000, 2056, 4104, 8200};
  for (std::int64_t width = 8; width <= 512; width += 8) widths.push_back(width);
  for (const auto width : widths)
    for (const auto type : kFloats) {
      auto x = Matrix::random(type, 2, width, rng, 2.0f), g = Matrix::random(type, 2, width, rng);
      auto weight = Matrix::random(DType::kFloat32, 1, width, rng);
      Matrix y(type, 2, width), d(type, 2, width);
      const auto w = weight.view().reshape({width});
      fixture().run(RmsNormArgs{x.view(), w, y.view(), 1e-5f});
      fixture().run(RmsNormBackwardArgs{g.view(), x.view(), w, d.view(), 1e-5f});
      double squares[2] = {}, products[2] = {};
      for (int i = 0; i < 2; ++i)
        for (std::int64_t k = 0; k < width; ++k)
          squares[i] += x(i, k) * x(i, k), products[i] += g(i, k) * weight(0, k) * x(i, k);
      const auto r = [&](auto i) { return 1 / std::sqrt(squares[i] / width + 1e-5); };
      EXPECT_LE(worst_error(y, [&](auto i, auto j) { return x(i, j) * r(i) * weight(0, j); }), epsilon(type)) << width;
      const auto gradient = [&](auto i, auto j) {
        return r(i) * (g(i, j) * weight(0, j) - x(i, j) * r(i) * r(i) * products[i] / width);
      };
      EXPECT_LE(worst_error(d, gradient), 4 * epsilon(type)) << width;
    }
}

TensorView heads_of(Matrix& m, std::int64_t heads, std::int64_t head_dim) {
  TensorView v(m.view().data(), m.dtype(), {m.rows(), heads, head_dim});
  v.set_stride(0, m.view().stride(0));
  return v;
}

TEST(Rotary, MatchesOracleAndInverts) {
  std::mt19937 rng(3);
  constexpr std::int64_t kTokens = 6, kHeads = 3, kPositions = 50;
  for (const std::int64_t head_dim : {2, 6, 16, 64, 80})
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        const std::int64_t half = head_dim / 2;
        auto x = Matrix::random(x_type, kTokens, kHeads * head_dim, rng, 1.0f, 7);
        Matrix y(y_type, kTokens, kHeads * head_dim, 1), back(DType::kFloat32, kTokens, kHeads * head_dim);
        Matrix cos(DType::kFloat32, kPositions, half), sin(DType::kFloat32, kPositions, half);
        for (std::int64_t p = 0; p < kPositions; ++p)
          for (std::int64_t k = 0; k < half; ++k) {
            const double angle = p * std::pow(10000.0, -double(k) / half);
            cos.set(p, k, std::cos(angle));
            sin.set(p, k, std::sin(angle));
          }
        SharedVector<std::int32_t> positions = {0, 49, 7, 8, 8, 1};
        RotaryArgs args{heads_of(x, kHeads, head_dim),
                        heads_of(y, kHeads, head_dim),
                        {positions.data(), DType::kInt32, {kTokens}},
                        cos.view(),
                        sin.view(),
                        false};
        fixture().run(args);
        const auto wanted = [&](auto i, auto j) {
          const auto h = j / head_dim, k = j % head_dim;
          const double c = cos(positions[i], k % half), s = sin(positions[i], k % half);
          return k < half ? x(i, j) * c - x(i, h * head_dim + k + half) * s
                          : x(i, j) * c + x(i, h * head_dim + k - half) * s;
        };
        EXPECT_LE(worst_error(y, wanted), epsilon(y_type)) << head_dim;
        EXPECT_TRUE(y.gaps_untouched());
        args.x = args.y, args.y = heads_of(back, kHeads, head_dim), args.inverse = true;
        fixture().run(args);
        EXPECT_LE(worst_error(back, [&](auto i, auto j) { return x(i, j); }), 2 * epsilon(y_type));
        if (x_type == y_type) {
          args.x = args.y = heads_of(x, kHeads, head_dim), args.inverse = false;
          fixture().run(args);
          EXPECT_TRUE(x.same(y)) << "in place, head_dim " << head_dim;
        }
      }
}

TEST(SiluMul, MatchesOracleAlsoForExtremeGates) {
  std::mt19937 rng(4);
  for (const auto width : kWidths)
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        auto gate = Matrix::random(x_type, 3, width, rng, 3.0f, 1), up = Matrix::random(x_type, 3, width, rng);
        gate.set(0, 0, 200.0f), gate.set(1, 0, -200.0f), gate.set(2, 0, 0.0f);
        Matrix y(y_type, 3, width, 2);
        fixture().run(SiluMulArgs{gate.view(), up.view(), y.view()});
        EXPECT_LE(worst_error(y, [&](auto i, auto j) { return gate(i, j) * sigmoid(gate(i, j)) * up(i, j); }),
                  epsilon(y_type));
        EXPECT_TRUE(y.gaps_untouched());
      }
}

TEST(SiluMul, BackwardMatchesOracleAndSkipsWhatIsNotWanted) {
  std::mt19937 rng(5);
  for (const auto width : kWidths)
    for (const auto g_type : kFloats)
      for (const auto x_type : kFloats)
        for (const auto a_type : kFloats)
          for (const auto b_type : kFloats) {
            auto grad = Matrix::random(g_type, 3, width, rng), gate = Matrix::random(x_type, 3, width, rng, 3.0f);
            auto up = Matrix::random(x_type, 3, width, rng, 1.0f, 4);
            gate.set(0, 0, 150.0f), gate.set(1, 0, -150.0f);
            Matrix grad_gate(a_type, 3, width, 1), grad_up(b_type, 3, width), only(b_type, 3, width);
            fixture().run(SiluMulBackwardArgs{grad.view(), gate.view(), up.view(), grad_gate.view(), grad_up.view()});
            EXPECT_LE(worst_error(grad_gate,
                                  [&](auto i, auto j) {
                                    const double s = sigmoid(gate(i, j));
                                    return grad(i, j) * up(i, j) * s * (1 + gate(i, j) * (1 - s));
                                  }),
                      epsilon(a_type));
            EXPECT_LE(
                worst_error(grad_up, [&](auto i, auto j) { return grad(i, j) * gate(i, j) * sigmoid(gate(i, j)); }),
                epsilon(b_type));
            fixture().run(SiluMulBackwardArgs{grad.view(), gate.view(), up.view(), {}, only.view()});
            EXPECT_TRUE(only.same(grad_up));
          }
}

TEST(Rows, GatherAndCopyConvertAndRespectStrides) {
  std::mt19937 rng(6);
  for (const auto width : kWidths)
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        auto x = Matrix::random(x_type, 7, width, rng, 1.0f, 3);
        Matrix y(y_type, 4, width, 2), z(y_type, 7, width, 1);
        SharedVector<std::int32_t> index = {6, 0, 3, 3};
        fixture().run(GatherRowsArgs{x.view(), {index.data(), DType::kInt32, {4}}, y.view()});
        const auto rounded = [&](double v) {
          return y_type == DType::kBFloat16 ? to_float(to_bfloat16(static_cast<float>(v))) : v;
        };
        EXPECT_EQ(worst_error(y, [&](auto i, auto j) { return rounded(x(index[i], j)); }), 0);
        EXPECT_TRUE(y.gaps_untouched());
        fixture().run(CopyArgs{x.view(), z.view()});
        fixture().run(CopyArgs{x.view(), z.view(), GradMode::kAccumulate});
        EXPECT_LE(worst_error(z, [&](auto i, auto j) { return 2 * x(i, j); }), 2 * epsilon(y_type));
        EXPECT_TRUE(z.gaps_untouched());
      }
}

TEST(Rows, RoundingKeepsInfinityAndNan) {
  Matrix x(DType::kFloat32, 1, 9), y(DType::kBFloat16, 1, 9);
  const float inf = std::numeric_limits<float>::infinity();
  for (int j = 0; j < 9; ++j) x.set(0, j, j == 0 ? inf : j == 1 ? -inf : j == 2 ? 1.00390625f : j == 3 ? 1e-40f : 3.5f);
  x.set(0, 8, std::numeric_limits<float>::quiet_NaN());
  fixture().run(CopyArgs{x.view(), y.view()});
  for (int j = 0; j < 8; ++j) EXPECT_EQ(y(0, j), to_float(to_bfloat16(static_cast<float>(x(0, j))))) << j;
  EXPECT_TRUE(std::isnan(y(0, 8)));
}

// A row's bits do not depend on the batch around it, its place, or the number of threads.
TEST(Elementwise, RowsDoNotSeeTheirBatch) {
  std::mt19937 rng(7);
  constexpr std::int64_t kRows = 301, kWidth = 193;
  OpFixture three(3);
  for (const auto type : kFloats) {
    auto x = Matrix::random(type, kRows, kWidth, rng), g = Matrix::random(type, kRows, kWidth, rng);
    auto weight = Matrix::random(DType::kFloat32, 1, kWidth, rng);
    const auto all = [&](OpFixture& ops, std::int64_t begin, std::int64_t end, std::vector<Matrix>& out) {
      const auto w = weight.view().reshape({kWidth});
      const auto xs = x.view().rows(begin, end), gs = g.view().rows(begin, end);
      const auto to = [&](int i) { return out[i].view().rows(begin, end); };
      ops.run(RmsNormArgs{xs, w, to(0)});
      ops.run(RmsNormBackwardArgs{gs, xs, w, to(1)});
      ops.run(SiluMulArgs{xs, gs, to(2)});
      ops.run(SiluMulBackwardArgs{gs, xs, gs, to(3), to(4)});
    };
    std::vector<Matrix> together(5, Matrix(type, kRows, kWidth)), alone = together;
    all(three, 0, kRows, together);
    for (std::int64_t i = 0; i < kRows; ++i) all(fixture(), i, i + 1, alone);
    for (int i = 0; i < 5; ++i) EXPECT_TRUE(together[i].same(alone[i])) << "output " << i;
  }
}

TEST(Elementwise, ZeroRowsDoNothing) {
  Matrix x(DType::kFloat32, 0, 8), y(DType::kFloat32, 0, 8), weight(DType::kFloat32, 1, 8);
  const auto w = weight.view().reshape({8});
  fixture().run(RmsNormArgs{x.view(), w, y.view()});
  fixture().run(RmsNormBackwardArgs{x.view(), x.view(), w, y.view()});
  fixture().run(SiluMulArgs{x.view(), x.view(), y.view()});
  fixture().run(SiluMulBackwardArgs{x.view(), x.view(), x.view(), y.view(), y.view()});
  fixture().run(CopyArgs{x.view(), y.view()});
  fixture().run(GatherRowsArgs{x.view(), TensorView(nullptr, DType::kInt32, {0}), y.view()});
}

TEST(Elementwise, BadArgumentsAreNamed) {
  Matrix x(DType::kFloat32, 2, 8), y(DType::kFloat32, 2, 7), weight(DType::kFloat32, 1, 8);
  const auto w = weight.view().reshape({8});
  const auto message = [&](auto&& args) -> std::string {
    try {
      fixture().run(args);
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message(RmsNormArgs{x.view(), w, y.view()}), "rms_norm: y is float32 [2, 7], wanted [2, 8]");
  EXPECT_EQ(message(RmsNormArgs{x.view(), {}, x.view()}), "rms_norm: weight is float32 [], wanted [8]");
  SharedVector<std::int32_t> index = {0, 2};
  // Indices on another device are not read by the host: such a row is NaN there.
  Matrix gathered(DType::kFloat32, 2, 8);
  const GatherRowsArgs outside{x.view(), {index.data(), DType::kInt32, {2}}, gathered.view()};
  if (on_cpu()) {
    EXPECT_EQ(message(outside), "gather_rows: index[1] is 2, wanted in [0, 2)");
  } else {
    x.set(0, 3, 5.0f);
    EXPECT_EQ(message(outside), "no error");
    EXPECT_EQ(gathered(0, 3), 5.0);
    EXPECT_TRUE(std::isnan(gathered(1, 3)));
  }
  auto column = x.view();
  column.set_stride(1, 2);
  EXPECT_NE(message(CopyArgs{column, x.view()}).find("stride 2 in its last dimension"), std::string::npos);
}

}  // namespace
}  // namespace flexcore::test
