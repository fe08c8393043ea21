#include <cuda_runtime.h>

#include <vector>

#include "backends/cuda/context.h"
#include "backends/cuda/gemm.h"
#include "core/bfloat16.h"

// Takes the place of the vendor's library where there is no GPU: each element is one float sum in ascending k.
namespace flexcore::cuda {

namespace {

float element(const TensorView& t, std::int64_t i, std::int64_t j) {
  return t.dtype() == DType::kBFloat16 ? to_float(t.row<const bfloat16>(i)[j]) : t.row<const float>(i)[j];
}

void multiply(const Gemm& g) {
  const std::int64_t m = g.m(), k = g.k(), n = g.n();
  std::vector<float> b(static_cast<std::size_t>(k * n));  // [k, n]
  for (std::int64_t l = 0; l < k; ++l)
    for (std::int64_t j = 0; j < n; ++j) b[l * n + j] = g.transpose_b ? element(g.b, j, l) : element(g.b, l, j);
  std::vector<float> sums(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < m; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (std::int64_t l = 0; l < k; ++l) {
      const float x = g.transpose_a ? element(g.a, l, i) : element(g.a, i, l);
      for (std::int64_t j = 0; j < n; ++j) sums[j] += x * b[l * n + j];
    }
    for (std::int64_t j = 0; j < n; ++j) {
      const float sum = g.alpha * sums[j] + (g.bias ? element(g.bias.reshape({1, n}), 0, j) : 0.0f) +
                        (g.accumulate ? element(g.c, i, j) : 0.0f);
      if (g.c.dtype() == DType::kBFloat16)
        g.c.row<bfloat16>(i)[j] = to_bfloat16(sum);
      else
        g.c.row<float>(i)[j] = sum;
    }
  }
}

}  // namespace

void gemm(OpContext& context, const Gemm& args) {
  simt::enqueue(handle_of(context), [args] {
    const simt::DeviceAccess access;
    simt::count_launch();
    multiply(args);
  });
}

}  // namespace flexcore::cuda
