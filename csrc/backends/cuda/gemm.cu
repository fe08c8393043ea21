#include "backends/cuda/context.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/kernels/rows.cuh"
#include "backends/cuda/views.h"

namespace flexcore::cuda {

namespace {

struct SimpleGemm {
  Rows a, b, c, bias;  // bias: one row, if it has data
  std::int64_t m, n, k;
  float alpha;
  bool transpose_a, transpose_b, accumulate;
};

constexpr int kSimpleThreads = 256;

/// An element a thread, its products in ascending k.
__global__ void __launch_bounds__(kSimpleThreads) simple_gemm_kernel(const SimpleGemm g) {
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kSimpleThreads + static_cast<int>(threadIdx.x);
  if (at >= g.m * g.n) return;
  const std::int64_t i = at / g.n, j = at % g.n;
  float sum = 0.0f, x[1], w[1];
  for (std::int64_t l = 0; l < g.k; ++l) {
    g.transpose_a ? g.a.load<1>(l, i, x) : g.a.load<1>(i, l, x);
    g.transpose_b ? g.b.load<1>(j, l, w) : g.b.load<1>(l, j, w);
    sum = fmaf(x[0], w[0], sum);
  }
  sum *= g.alpha;
  if (g.bias.data != nullptr) {
    g.bias.load<1>(0, j, w);
    sum += w[0];
  }
  if (g.accumulate) {
    g.c.load<1>(i, j, w);
    sum += w[0];
  }
  const float result[1] = {sum};
  g.c.store<1>(i, j, result);
}

}  // namespace

void simple_gemm(OpContext& context, const Gemm& g) {
  const SimpleGemm args{
      rows_of(g.a),  rows_of(g.b),  rows_of(g.c), g.bias ? rows_of(g.bias.reshape({1, g.bias.shape(0)})) : Rows{},
      g.m(),         g.n(),         g.k(),        g.alpha,
      g.transpose_a, g.transpose_b, g.accumulate};
  const std::int64_t blocks = (args.m * args.n + kSimpleThreads - 1) / kSimpleThreads;
  launch(simple_gemm_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSimpleThreads), 0, handle_of(context), args);
  check_launch("linear");
}

}  // namespace flexcore::cuda
