#include "ops/product.h"

#include <algorithm>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/gemm.h"
#include "backends/cpu/kernels/sgemm.h"
#include "core/number.h"
#include "ops/table.h"

namespace flexcore::cpu {

namespace {

// A task's tile of c: a few register tiles each way. An element's bits do not depend on the cut.
constexpr std::int64_t kBlockRows = 96, kBlockColumns = 512;

void product(OpContext& context, const ProductArgs& args) {
  const std::int64_t m = args.rows(), n = args.columns(), across = divide_up(n, kBlockColumns);
  const std::int64_t lda = args.a.stride(0), ldb = args.b.stride(0);
  context.threads->parallel_for(divide_up(m, kBlockRows) * across, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t i = tile / across * kBlockRows, j = tile % across * kBlockColumns;
      gemm_kernels().sgemm({.m = std::min(kBlockRows, m - i),
                            .n = std::min(kBlockColumns, n - j),
                            .k = args.depth(),
                            .a = args.a.as<const float>() + (args.transpose_a ? i : i * lda),
                            .lda = lda,
                            .b = args.b.as<const float>() + (args.transpose_b ? j * ldb : j),
                            .ldb = ldb,
                            .c = args.c.row<float>(i) + j,
                            .ldc = args.c.stride(0),
                            .alpha = args.alpha,
                            .transpose_a = args.transpose_a,
                            .transpose_b = args.transpose_b,
                            .accumulate = args.mode == GradMode::kAccumulate});
    }
  });
}

void require_tokens(std::string_view op, const TensorView& token_ids, std::int64_t num_tokens) {
  const auto* ids = token_ids.as<const std::int32_t>();
  for (std::int64_t i = 0; i < token_ids.size(); ++i)
    require(0 <= ids[i] && ids[i] < num_tokens, op, ": token_ids[", i, "] is ", ids[i], ", wanted in [0, ", num_tokens,
            ")");
}

void table_look_up(OpContext& context, const TableLookUpArgs& args) {
  require_tokens(args.kName, args.token_ids, args.table.num_tokens);
  const auto* ids = args.token_ids.as<const std::int32_t>();
  context.threads->parallel_for(args.y.shape(0), 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float* row = args.table.data + ids[i] * args.table.token_stride;
      float* y = args.y.row<float>(i);
      for (std::int64_t j = 0; j < args.table.width; ++j) y[j] = row[j * args.table.column_stride];
    }
  });
}

// Tasks are columns, so that rows of one token are added in their order.
void table_add(OpContext& context, const TableAddArgs& args) {
  require_tokens(args.kName, args.token_ids, args.table.num_tokens);
  const auto* ids = args.token_ids.as<const std::int32_t>();
  context.threads->parallel_for(args.table.width, 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = 0; i < args.x.shape(0); ++i) {
      const float* x = args.x.row<const float>(i);
      float* row = args.table.data + ids[i] * args.table.token_stride;
      for (std::int64_t j = begin; j < end; ++j) row[j * args.table.column_stride] += x[j];
    }
  });
}

}  // namespace

void register_product(OpRegistry& registry) {
  registry.add<ProductArgs>(DeviceKind::kCpu, product);
  registry.add<TableLookUpArgs>(DeviceKind::kCpu, table_look_up);
  registry.add<TableAddArgs>(DeviceKind::kCpu, table_add);
}

}  // namespace flexcore::cpu
