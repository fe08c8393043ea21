#include <gtest/gtest.h>

#include <cmath>

#include "core/philox.h"
#include "op_fixture.h"
#include "ops/dora.h"
#include "ops/dropout.h"
#include "ops/lora.h"
#include "ops/scale.h"

namespace flexcore::test {
namespace {

constexpr std::int64_t kWidths[] = {1, 3, 8, 17, 64, 97, 576};

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

/// Rows 1 to 3 with one vector, 5 with another; 0, 4 and those behind with none.
struct Scaled {
  Scaled(std::int64_t width, std::mt19937& rng)
      : first(Matrix::random(DType::kFloat32, 1, width, rng)),
        second(Matrix::random(DType::kFloat32, 1, width, rng)),
        offset(Matrix::random(DType::kFloat32, 1, width, rng)),
        divisor(Matrix::random(DType::kFloat32, 1, width, rng)),
        grad_first(Matrix::random(DType::kFloat32, 1, width, rng)),
        grad_second(grad_first) {
    segments = {{.begin = 0, .end = 0},
                {.begin = 1,
                 .end = 4,
                 .scale = first.floats(),
                 .offset = offset.floats(),
                 .grad_scale = grad_first.floats(),
                 .grad_divisor = divisor.floats()},
                {.begin = 5, .end = 6, .scale = second.floats(), .grad_scale = grad_second.floats()}};
  }
  static constexpr std::int64_t kRows = 8;
  double scale_at(std::int64_t i, std::int64_t j) const {
    return i >= 1 && i < 4 ? first(0, j) : i == 5 ? second(0, j) : 1.0;
  }
  double offset_at(std::int64_t i, std::int64_t j) const { return i >= 1 && i < 4 ? offset(0, j) : 0.0; }

  Matrix first, second, offset, divisor, grad_first, grad_second;
  std::vector<ScaleSegment> segments;
};

TEST(Scale, MatchesOracleInPlaceAndApart) {
  std::mt19937 rng(1);
  for (const auto width : kWidths)
    for (const auto type : kFloats) {
      const Scaled scaled(width, rng);
      auto x = Matrix::random(type, Scaled::kRows, width, rng, 1.0f, 3);
      Matrix y(type, Scaled::kRows, width, 5);
      fixture().run(ScaleArgs{x.view(), y.view(), scaled.segments});
      const auto wanted = [&](auto i, auto j) {
        const double o = scaled.offset_at(i, j);
        return o + scaled.scale_at(i, j) * (x(i, j) - o);
      };
      EXPECT_LE(worst_error(y, wanted), 2 * epsilon(type)) << width;
      EXPECT_TRUE(y.gaps_untouched());
      for (const std::int64_t row : {0, 4, 6, 7}) EXPECT_TRUE(y.same_row(row, x, row));
      fixture().run(ScaleArgs{x.view(), x.view(), scaled.segments});
      EXPECT_TRUE(x.same(y)) << "in place, width " << width;
    }
}

TEST(Scale, BackwardMatchesOracle) {
  std::mt19937 rng(2);
  for (const auto width : kWidths)
    for (const auto g_type : kFloats)
      for (const auto x_type : kFloats)
        for (const bool wanted_x : {true, false}) {
          Scaled scaled(width, rng);
          if (width > 1) scaled.divisor.set(0, 1, 0.0f);  // undivided there
          const Matrix before = scaled.grad_first;
          auto g = Matrix::random(g_type, Scaled::kRows, width, rng, 1.0f, 2);
          auto x = Matrix::random(x_type, Scaled::kRows, width, rng, 1.0f, 1);
          Matrix grad_x(g_type, Scaled::kRows, width, 3);
          fixture().run(
              ScaleBackwardArgs{g.view(), x.view(), scaled.segments, wanted_x ? grad_x.view() : TensorView{}});
          if (wanted_x) {
            EXPECT_LE(worst_error(grad_x, [&](auto i, auto j) { return scaled.scale_at(i, j) * g(i, j); }),
                      epsilon(g_type));
            EXPECT_TRUE(grad_x.gaps_untouched());
          }
          const auto sum = [&](std::int64_t begin, std::int64_t end, std::int64_t j) {
            double total = 0;
            for (std::int64_t i = begin; i < end; ++i) total += g(i, j) * (x(i, j) - scaled.offset_at(i, j));
            return total;
          };
          const auto first = [&](auto, auto j) {
            const double divisor = scaled.divisor(0, j);
            return before(0, j) + sum(1, 4, j) / (divisor == 0 ? 1 : divisor);
          };
          for (std::int64_t j = 0; j < width; ++j) {
            const double size = 1 + std::abs(first(0, j)) + std::abs(sum(1, 4, j));
            EXPECT_NEAR(scaled.grad_first(0, j), first(0, j), 1e-5 * size) << width << " " << j;
          }
          EXPECT_LE(worst_error(scaled.grad_second, [&](auto, auto j) { return before(0, j) + sum(5, 6, j); }), 1e-5);
        }
}

TEST(Scale, NoRowsAndNoSegments) {
  Matrix none(DType::kFloat32, 0, 5);
  fixture().run(ScaleArgs{none.view(), none.view(), {}});
  fixture().run(ScaleBackwardArgs{none.view(), none.view(), {}, none.view()});
  std::mt19937 rng(3);
  auto x = Matrix::random(DType::kBFloat16, 3, 5, rng);
  Matrix y(DType::kBFloat16, 3, 5);
  fixture().run(ScaleArgs{x.view(), y.view(), {}});
  EXPECT_TRUE(y.same(x));
}

TEST(Scale, RefusesSegmentsThatMakeNoSense) {
  Matrix x(DType::kFloat32, 4, 5);
  const float scale[5] = {};
  const auto refusal = [&](std::vector<ScaleSegment> segments) {
    try {
      fixture().run(ScaleArgs{x.view(), x.view(), segments});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  EXPECT_EQ(refusal({{.begin = 2, .end = 5, .scale = scale}}),
            "scale: segment 0 is rows [2, 5), wanted ascending disjoint rows in [0, 4)");
  EXPECT_EQ(refusal({{.begin = 1, .end = 3, .scale = scale}, {.begin = 2, .end = 4, .scale = scale}}),
            "scale: segment 1 is rows [2, 4), wanted ascending disjoint rows in [3, 4)");
  EXPECT_EQ(refusal({{.begin = 1, .end = 3}}), "scale: segment 0 has no scale");
}

/// As ops/dropout.h says.
double kept(const DropoutMask& mask, std::int64_t position, std::int64_t feature) {
  const auto bits = philox({static_cast<std::uint32_t>(mask.seed), static_cast<std::uint32_t>(mask.seed >> 32)},
                           {static_cast<std::uint32_t>(feature / 128 * 16 + feature % 16),
                            static_cast<std::uint32_t>(position), mask.module, mask.sequence});
  const auto n = feature % 128 / 16;
  const std::uint32_t word = bits[static_cast<std::size_t>(n / 2)], number = n % 2 == 0 ? word & 0xffff : word >> 16;
  const auto threshold = static_cast<std::uint32_t>(std::lround(mask.p * 65536));
  return number < threshold ? 0.0 : 65536.0 / (65536.0 - threshold);
}

TEST(Dropout, MatchesOracle) {
  std::mt19937 rng(4);
  for (const auto width : kWidths)
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats)
        for (const auto mode : {GradMode::kWrite, GradMode::kAccumulate})
          for (const double p : {0.0, 0.1, 0.75}) {
            const DropoutMask mask{p, 0x123456789abcdefu, 7, 3};
            auto x = Matrix::random(x_type, 5, width, rng, 1.0f, 3);
            const auto before = Matrix::random(y_type, 5, width, rng, 1.0f, 1);
            auto y = mode == GradMode::kWrite ? Matrix(y_type, 5, width, 1) : before;
            fixture().run(DropoutArgs{x.view(), y.view(), mask, 11, mode});
            const auto wanted = [&](auto i, auto j) {
              return kept(mask, 11 + i, j) * x(i, j) + (mode == GradMode::kAccumulate ? before(i, j) : 0);
            };
            EXPECT_LE(worst_error(y, wanted), epsilon(y_type)) << width << " " << p;
            EXPECT_TRUE(y.gaps_untouched());
            // What that changes, taken back: with y as it was, x less what is kept.
            y = mode == GradMode::kWrite ? Matrix(y_type, 5, width, 1) : before;
            fixture().run(DropoutArgs{x.view(), y.view(), mask, 11, mode, -1.0f, 1.0f});
            const auto left = [&](auto i, auto j) {
              return (1 - kept(mask, 11 + i, j)) * x(i, j) + (mode == GradMode::kAccumulate ? before(i, j) : 0);
            };
            EXPECT_LE(worst_error(y, left), epsilon(y_type)) << width << " " << p;
            EXPECT_TRUE(y.gaps_untouched());
          }
}

TEST(Dropout, DropsTheShareAskedForWhateverTheSplit) {
  constexpr std::int64_t kRows = 64, kWidth = 640;
  Matrix x(DType::kFloat32, kRows, kWidth), y(DType::kFloat32, kRows, kWidth), part(DType::kFloat32, kRows, kWidth);
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < kWidth; ++j) x.set(i, j, 1.0f);
  const DropoutMask mask{0.25, 9, 1, 2};
  fixture().run(DropoutArgs{x.view(), y.view(), mask, 0});
  double dropped = 0, sum = 0;
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < kWidth; ++j) dropped += y(i, j) == 0, sum += y(i, j);
  const double count = kRows * kWidth, deviation = std::sqrt(count * 0.25 * 0.75);
  EXPECT_NEAR(dropped, 0.25 * count, 5 * deviation);
  EXPECT_NEAR(sum, count, 5 * deviation / 0.75);
  for (const auto& [begin, end] : {std::pair(0, 1), {1, 20}, {20, 64}})
    fixture().run(DropoutArgs{x.view().rows(begin, end), part.view().rows(begin, end), mask, begin});
  EXPECT_TRUE(part.same(y));
  // Another sequence, module or seed has other numbers.
  for (const auto& other : {DropoutMask{0.25, 9, 2, 2}, DropoutMask{0.25, 9, 1, 3}, DropoutMask{0.25, 10, 1, 2}}) {
    fixture().run(DropoutArgs{x.view(), part.view(), other, 0});
    double both = 0;
    for (std::int64_t i = 0; i < kRows; ++i)
      for (std::int64_t j = 0; j < kWidth; ++j) both += part(i, j) == 0 && y(i, j) == 0;
    EXPECT_NEAR(both, count / 16, 5 * std::sqrt(count / 16));
  }
}

TEST(DoraScale, MatchesOracle) {
  std::mt19937 rng(5);
  for (const auto type : kFloats)
    for (const auto& [out, in, rank] :
         {std::tuple(1, 1, 1), {3, 5, 2}, {70, 33, 4}, {130, 64, 17}, {16, 576, 256}, {65, 2049, 8}}) {
      auto w = Matrix::random(type, out, in, rng, 0.5f);
      auto a = Matrix::random(DType::kFloat32, rank, in, rng), b = Matrix::random(DType::kFloat32, out, rank, rng);
      const auto magnitude = Matrix::random(DType::kFloat32, 1, out, rng);
      std::size_t bytes = 0;
      fixture().run(PackedWeightBytesArgs{out, in, type, &bytes});
      SharedVector<std::byte> packed(bytes);
      fixture().run(PackWeightArgs{w.view(), type, packed.data()});
      Matrix norm(DType::kFloat32, 1, out), scale(DType::kFloat32, 1, out);
      DoraScaleArgs args{.weight = {packed.data(), type, out, in, true},
                         .lora_a = a.floats(),
                         .lora_b = b.floats(),
                         .rank = rank,
                         .scaling = 0.3f,
                         .magnitude = const_cast<Matrix&>(magnitude).floats(),
                         .norm = norm.view().reshape({out}),
                         .scale = scale.view().reshape({out})};
      fixture().run(args);
      const auto wanted = [&](auto, auto i) {
        double squares = 0;
        for (std::int64_t k = 0; k < in; ++k) {
          double sum = w(i, k);
          for (std::int64_t r = 0; r < rank; ++r) sum += 0.3f * b(i, r) * a(r, k);
          squares += sum * sum;
        }
        return std::sqrt(squares);
      };
      EXPECT_LE(worst_error(norm, wanted), 1e-5) << out << " " << in << " " << rank;
      EXPECT_LE(worst_error(scale, [&](auto, auto i) { return magnitude(0, i) / wanted(0, i); }), 1e-5);
      args.magnitude = nullptr;
      fixture().run(args);
      EXPECT_LE(worst_error(scale, [](auto, auto) { return 1.0; }), 0.0);
    }
}

double apply(Activation activation, double v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return std::max(v, 0.0);
    case Activation::kTanh:
      return std::tanh(v);
    case Activation::kGelu:
      return v / 2 * (1 + std::erf(v / std::sqrt(2.0)));
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
  }
  return 0;
}

// Against differences of the forward, in double.
TEST(LoraActivation, ForwardAndBackwardMatchOracle) {
  std::mt19937 rng(6);
  constexpr std::int64_t kRows = 70, kBegin = 2, kEnd = 67;
  for (const auto activation : {Activation::kRelu, Activation::kTanh, Activation::kGelu, Activation::kSilu})
    for (const auto& [in, out, rank] : {std::tuple(5, 3, 1), {64, 33, 6}, {1100, 48, 13}})
      for (const auto type : kFloats) {
        auto x = Matrix::random(type, kRows, in, rng), grad_y = Matrix::random(type, kRows, out, rng);
        const float scale = 1.5f / std::sqrt(static_cast<float>(in));
        auto a = Matrix::random(DType::kFloat32, rank, in, rng, scale),
             b = Matrix::random(DType::kFloat32, out, rank, rng);
        Matrix grad_a(DType::kFloat32, rank, in), grad_b(DType::kFloat32, out, rank),
            grad_x(DType::kFloat32, kRows, in);
        for (auto* m : {&grad_a, &grad_b, &grad_x})
          for (std::int64_t i = 0; i < m->rows(); ++i)
            for (std::int64_t j = 0; j < m->width(); ++j) m->set(i, j, 0.0f);
        auto y = Matrix::random(DType::kFloat32, kRows, out, rng);
        const Matrix before = y;
        const LoraSegment segment{kBegin,          kEnd,      a.floats(), b.floats(), rank, 0.7f, grad_a.floats(),
                                  grad_b.floats(), activation};
        const LoraArgs::Member forward{y.view(), {&segment, 1}};
        fixture().run(LoraArgs{x.view(), {&forward, 1}});
        const LoraBackwardArgs::Member backward{grad_y.view(), {&segment, 1}};
        fixture().run(LoraBackwardArgs{x.view(), {&backward, 1}, grad_x.view()});

        std::vector<double> u(kRows * rank), derivative(kRows * rank), grad_u(kRows * rank);
        for (std::int64_t i = kBegin; i < kEnd; ++i)
          for (std::int64_t r = 0; r < rank; ++r) {
            double v = 0;
            for (std::int64_t k = 0; k < in; ++k) v += x(i, k) * a(r, k);
            u[i * rank + r] = apply(activation, v);
            derivative[i * rank + r] = (apply(activation, v + 1e-6) - apply(activation, v - 1e-6)) / 2e-6;
            if (activation == Activation::kRelu) derivative[i * rank + r] = v > 0;
            for (std::int64_t j = 0; j < out; ++j) grad_u[i * rank + r] += grad_y(i, j) * b(j, r);
            grad_u[i * rank + r] *= derivative[i * rank + r];
          }
        const auto inside = [&](auto i) { return i >= kBegin && i < kEnd; };
        const double slack = type == DType::kBFloat16 ? 2e-3 : 2e-5;
        EXPECT_LE(worst_error(y,
                              [&](auto i, auto j) {
                                double sum = 0;
                                for (std::int64_t r = 0; r < rank && inside(i); ++r) sum += u[i * rank + r] * b(j, r);
                                return before(i, j) + 0.7f * sum;
                              }),
                  slack)
            << in << " " << rank << " " << static_cast<int>(activation);
        EXPECT_LE(worst_error(grad_x,
                              [&](auto i, auto k) {
                                double sum = 0;
                                for (std::int64_t r = 0; r < rank && inside(i); ++r)
                                  sum += grad_u[i * rank + r] * a(r, k);
                                return 0.7f * sum;
                              }),
                  slack);
        const auto gradient = [&](const auto& factor, auto r, auto&& other) {
          double sum = 0, size = 0;
          for (std::int64_t i = kBegin; i < kEnd; ++i) {
            sum += factor[i * rank + r] * other(i);
            size += std::abs(factor[i * rank + r] * other(i));
          }
          return std::pair(0.7f * sum, size);
        };
        for (std::int64_t r = 0; r < rank; ++r) {
          for (std::int64_t k = 0; k < in; ++k) {
            const auto [wanted, size] = gradient(grad_u, r, [&](auto i) { return x(i, k); });
            ASSERT_NEAR(grad_a(r, k), wanted, slack * (1 + size)) << in << " " << rank;
          }
          for (std::int64_t j = 0; j < out; ++j) {
            const auto [wanted, size] = gradient(u, r, [&](auto i) { return grad_y(i, j); });
            ASSERT_NEAR(grad_b(j, r), wanted, slack * (1 + size)) << in << " " << rank;
          }
        }
      }
}

}  // namespace
}  // namespace flexcore::test
