#include "backends/cuda/gemm.h"

#include <gtest/gtest.h>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

// What shapes fall back to, beside the reference that stands for the library here.
TEST(SimpleGemm, IsTheReference) {
  OpFixture ops(1);
  std::mt19937 rng(3);
  for (const auto dtype : {DType::kFloat32, DType::kBFloat16})
    for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{1, 1, 1}, {3, 5, 7}, {17, 33, 9}, {2, 300, 4}})
      for (const int form : {0, 1, 2, 3, 4, 5, 6, 7}) {
        const bool transposed = form & 1, accumulate = form & 2, biased = form & 4;
        auto a = Matrix::random(dtype, m, k, rng, 1, 2);
        auto b = transposed ? Matrix::random(dtype, n, k, rng, 1, 1) : Matrix::random(dtype, k, n, rng, 1, 1);
        auto bias = Matrix::random(dtype, 1, n, rng);
        auto c = Matrix::random(dtype, m, n, rng, 1, 3);
        Matrix wanted = c;
        cuda::Gemm g{
            .a = a.view(), .b = b.view(), .c = wanted.view(), .transpose_b = transposed, .accumulate = accumulate};
        if (biased) g.bias = bias.view().reshape({n});
        cuda::gemm(ops.context(), g);
        g.c = c.view();
        cuda::simple_gemm(ops.context(), g);
        test_runtime().synchronize();
        EXPECT_TRUE(c.gaps_untouched());
        for (std::int64_t i = 0; i < m; ++i)
          for (std::int64_t j = 0; j < n; ++j)
            ASSERT_NEAR(c(i, j), wanted(i, j), 1e-5 + (dtype == DType::kFloat32 ? 1e-5 : 1e-2) * std::abs(wanted(i, j)))
                << m << " x " << n << " x " << k << ", form " << form;
      }
}

}  // namespace
}  // namespace flexcore::test
