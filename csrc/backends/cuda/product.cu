#include "backends/cuda/families.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/kernels/table.cuh"
#include "backends/cuda/views.h"
#include "ops/product.h"
#include "ops/table.h"

namespace flexcore::cuda {

namespace {

void product(OpContext& context, const ProductArgs& args) {
  gemm(context, {.a = args.a,
                 .b = args.b,
                 .c = args.c,
                 .alpha = args.alpha,
                 .transpose_a = args.transpose_a,
                 .transpose_b = args.transpose_b,
                 .accumulate = args.mode == GradMode::kAccumulate});
}

template <class Kernel>
void over_table(OpContext& context, std::string_view op, Kernel kernel, const TensorView& token_ids,
                const TensorView& x, const TokenTable& table) {
  if (x.shape(0) == 0) return;
  const dim3 grid(static_cast<unsigned>(x.shape(0)),
                  static_cast<unsigned>((table.width + kTableThreads - 1) / kTableThreads));
  launch(kernel, grid, dim3(kTableThreads), 0, handle_of(context),
         TableRows{.token_ids = token_ids.as<const std::int32_t>(),
                   .rows = static_cast<int>(x.shape(0)),
                   .x = x.as<float>(),
                   .x_stride = x.stride(0),
                   .table = table.data,
                   .num_tokens = table.num_tokens,
                   .width = table.width,
                   .token_stride = table.token_stride,
                   .column_stride = table.column_stride});
  check_launch(op);
}

void table_look_up(OpContext& context, const TableLookUpArgs& args) {
  over_table(context, args.kName, table_look_up_kernel, args.token_ids, args.y, args.table);
}

void table_add(OpContext& context, const TableAddArgs& args) {
  over_table(context, args.kName, table_add_kernel, args.token_ids, args.x, args.table);
}

}  // namespace

void register_product(OpRegistry& registry) {
  registry.add<ProductArgs>(DeviceKind::kCuda, product);
  registry.add<TableLookUpArgs>(DeviceKind::kCuda, table_look_up);
  registry.add<TableAddArgs>(DeviceKind::kCuda, table_add);
}

}  // namespace flexcore::cuda
