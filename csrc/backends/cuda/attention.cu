#include "backends/cuda/attention_operands.h"
#include "backends/cuda/families.h"
#include "backends/cuda/kernels/attention_exact.cuh"
#include "backends/cuda/kernels/attention_forward.cuh"
#include "backends/cuda/kernels/attention_forward_small.cuh"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/tables.h"
#include "ops/attention.h"

namespace flexcore::cuda {

namespace {

void kv_write(OpContext& context, const KvWriteArgs& args) {
  const std::int64_t heads = args.pages.keys.shape(1), block_size = args.pages.keys.shape(2),
                     head_dim = args.pages.keys.shape(3);
  const CallScope scope(context);
  const KvSlots table = kv_slots(context, args.spans, page_rows(args.pages.keys), block_size);
  const WritePages write{
      head_rows_of(args.k), head_rows_of(args.v),       page_rows_of(args.pages.keys), page_rows_of(args.pages.values),
      table.slots,          static_cast<int>(head_dim), static_cast<int>(block_size)};
  map_rows(write, table.count, heads * head_dim,
           write.k.packs && write.v.packs && aligned_for_packs(args.pages.keys) && aligned_for_packs(args.pages.values),
           handle_of(context));
  check_launch(args.kName);
}

template <int D>
AttentionCut forward_cut(bool tensor_cores, std::int64_t multiprocessors) {
  using Exact = ExactForwardShape<D>;
  using Shape = ForwardShape<D>;
  if (!tensor_cores)
    return {.tile_rows = {16, 16 * Exact::kRows},
            .key_tile = kExactKeys,
            .owned_keys = 0,
            .slots = multiprocessors * Exact::kBlocks};
  return {.tile_rows = {16, 32, 64, Shape::Block::kTile > 64 ? Shape::Block::kTile : 0},
          .key_tile = Shape::Block::kTile,
          .owned_keys = 0,
          .slots = multiprocessors * Shape::kBlocks};
}

void attention(OpContext& context, const AttentionArgs& args) {
  AttentionProblem p = attention_problem(args.q, args.y, args.lse, args.pages, args.scale, args.sliding_window);
  const bool tensor_cores = on_tensor_cores(p, p.q);
  const CallScope call(context);
  over_head_dims(p.head_dim, [&]<int D>() {
    using Exact = ExactForwardShape<D>;
    using Shape = ForwardShape<D>;
    const AttentionTables tables =
        attention_tables(context, args.spans, heads_of(p, args.sliding_window),
                         forward_cut<D>(tensor_cores, stream_of(context).num_multiprocessors));
    if (tables.num_items == 0) return;
    const Arena::Scope scope(*context.scratch);
    p.block_tables = tables.block_tables;
    const auto partial_rows = static_cast<std::size_t>(tables.partial_rows * p.num_kv_heads);
    const AttentionPartials partials{context.scratch->allocate<float>(partial_rows * p.head_dim),
                                     context.scratch->allocate<float2>(partial_rows)};
    const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const dim3 grid(static_cast<unsigned>(tables.num_items), kv_heads);
    if (tensor_cores)
      launch(attention_forward_kernel<D>, grid, dim3(Shape::Block::kThreads), Shape::kSharedBytes, handle_of(context),
             p, tables.items, partials);
    else
      launch(exact_attention_forward_kernel<D>, grid, dim3(kExactThreads), Exact::kSharedBytes, handle_of(context), p,
             tables.items, partials);
    if (tables.num_merges > 0)
      launch(attention_merge_kernel, dim3(static_cast<unsigned>(tables.num_merges), kv_heads),
             dim3(kMergeRows * kWarpSize), 0, handle_of(context), p, partials, tables.merges);
  });
  check_launch(args.kName);
}

}  // namespace

void register_attention(OpRegistry& registry) {
  registry.add<KvWriteArgs>(DeviceKind::kCuda, kv_write);
  registry.add<AttentionArgs>(DeviceKind::kCuda, attention);
  register_attention_backward(registry);
}

}  // namespace flexcore::cuda
