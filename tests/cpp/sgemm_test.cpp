// The header declares sgemm for one instruction set; the table holds the active one's.
#define FLEXCORE_ISA base
#include "backends/cpu/kernels/sgemm.h"

#include <gtest/gtest.h>

#include "backends/cpu/kernels/gemm.h"
#include "op_fixture.h"

namespace flexcore::test {
namespace {

// [rows, columns], stored as it is or transposed, with a gap after each stored row.
struct Operand {
  Operand(std::int64_t rows, std::int64_t columns, bool transposed, std::mt19937& rng)
      : stored(Matrix::random(DType::kFloat32, transposed ? columns : rows, transposed ? rows : columns, rng, 1, 3)),
        transposed(transposed) {}
  double operator()(std::int64_t i, std::int64_t j) const { return transposed ? stored(j, i) : stored(i, j); }
  std::int64_t stride() const { return stored.width() + 3; }
  Matrix stored;
  bool transposed;
};

TEST(SgemmTest, MatchesReference) {
  std::mt19937 rng(3);
  for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{1, 1, 1},
                                {1, 16, 16},
                                {2, 3, 0},
                                {5, 31, 7},
                                {6, 16, 33},
                                {7, 17, 8},
                                {12, 32, 64},
                                {13, 70, 257},
                                {25, 15, 600},
                                {64, 64, 16},
                                {0, 4, 4},
                                {4, 0, 4}}) {
    for (int form = 0; form < 8; ++form) {
      const bool accumulate = form & 4;
      const float alpha = form == 0 ? 1.0f : -0.75f;
      Operand a(m, k, form & 1, rng), b(k, n, form & 2, rng);
      auto c = accumulate ? Matrix::random(DType::kFloat32, m, n, rng, 1, 2) : Matrix(DType::kFloat32, m, n, 2);
      const Matrix before = c;
      cpu::gemm_kernels().sgemm({.m = m,
                                 .n = n,
                                 .k = k,
                                 .a = a.stored.floats(),
                                 .lda = a.stride(),
                                 .b = b.stored.floats(),
                                 .ldb = b.stride(),
                                 .c = c.floats(),
                                 .ldc = n + 2,
                                 .alpha = alpha,
                                 .transpose_a = a.transposed,
                                 .transpose_b = b.transposed,
                                 .accumulate = accumulate});
      const auto wanted = [&](std::int64_t i, std::int64_t j) {
        double sum = 0;
        for (std::int64_t l = 0; l < k; ++l) sum += a(i, l) * b(l, j);
        return alpha * sum + (accumulate ? before(i, j) : 0.0);
      };
      EXPECT_LT(worst_error(c, wanted), 2e-5) << m << " x " << n << " x " << k << ", form " << form;
      EXPECT_TRUE(c.gaps_untouched());
    }
  }
}

TEST(SgemmTest, BitsDoNotDependOnTheNeighbours) {
  std::mt19937 rng(4);
  constexpr std::int64_t kM = 40, kN = 83, kK = 300;
  Operand a(kM, kK, false, rng), b(kK, kN, false, rng);
  Matrix all(DType::kFloat32, kM, kN);
  cpu::SgemmArgs args{.m = kM,
                      .n = kN,
                      .k = kK,
                      .a = a.stored.floats(),
                      .lda = a.stride(),
                      .b = b.stored.floats(),
                      .ldb = b.stride(),
                      .c = all.floats(),
                      .ldc = kN,
                      .alpha = 0.3f};
  cpu::gemm_kernels().sgemm(args);
  for (const std::int64_t row : {0, 7, 39}) {
    for (const std::int64_t column : {0, 5, 50, 82}) {
      float one = 0;
      args.m = args.n = 1;
      args.a = a.stored.floats() + row * a.stride();
      args.b = b.stored.floats() + column;
      args.c = &one;
      cpu::gemm_kernels().sgemm(args);
      EXPECT_EQ(one, static_cast<float>(all(row, column))) << row << ", " << column;
    }
  }
}

}  // namespace
}  // namespace flexcore::test
