#include <vector>

#include "backends/cuda/attention_operands.h"
#include "backends/cuda/families.h"
#include "backends/cuda/kernels/attention_backward.cuh"
#include "backends/cuda/kernels/attention_backward_small.cuh"
#include "backends/cuda/kernels/attention_exact_backward.cuh"
#include "backends/cuda/kernels/elementwise.cuh"
#include "ops/attention.h"

namespace flexcore::cuda {

namespace {

template <int D>
AttentionCut backward_cut(bool tensor_cores, std::int64_t multiprocessors) {
  if (!tensor_cores)
    return {.tile_rows = {ExactBackwardShape<D>::kTile},
            .key_tile = kExactKeys,
            .owned_keys = ExactBackwardShape<D>::kTile,
            .slots = multiprocessors * ExactBackwardShape<D>::kBlocks};
  using Block = typename GradQShape<D>::Block;
  return {.tile_rows = {16, 32, Block::kTile > 32 ? Block::kTile : 0},
          .key_tile = Block::kTile,
          .owned_keys = GradKvShape<D>::kKeys,
          .slots = multiprocessors * GradQShape<D>::kBlocks};
}

// The gradient in bfloat16: tensor cores round it for the products in any case.
TensorView in_bfloat16(OpContext& context, const TensorView& x) {
  const std::int64_t rows = x.shape(0), width = x.shape(1) * x.shape(2);
  if (x.dtype() == DType::kBFloat16 || x.stride(1) != x.shape(2)) return x;
  const TensorView y = context.scratch->tensor(DType::kBFloat16, {rows, x.shape(1), x.shape(2)});
  map_rows(CopyRows{rows_of(x), rows_of(y), nullptr, 0, false}, rows, width,
           packs_of(rows_of(x), width) && packs_of(rows_of(y), width), handle_of(context));
  return y;
}

void attention_backward(OpContext& context, const AttentionBackwardArgs& args) {
  AttentionProblem p = attention_problem(args.q, args.y, args.lse, args.pages, args.scale, args.sliding_window);
  std::vector<AttentionSpan> spans;
  std::vector<AttentionSums> sums;
  for (const auto& window : args.spans) {
    spans.push_back(window.span);
    sums.push_back({window.grad_k, window.grad_v});
  }
  const cudaStream_t stream = handle_of(context);
  const Arena::Scope scope(*context.scratch);
  AttentionGradients g{
      on_tensor_cores(p, p.q) ? head_rows_of(in_bfloat16(context, args.grad_y)) : head_rows_of(args.grad_y),
      head_rows_of(args.grad_q),
      head_rows_of(args.grad_k_rows),
      head_rows_of(args.grad_v_rows),
      nullptr,
      nullptr};
  const bool tensor_cores = on_tensor_cores(p, p.q, g.grad_y);
  over_head_dims(p.head_dim, [&]<int D>() {
    const AttentionTables tables =
        attention_tables_of_call(context, spans, heads_of(p, args.sliding_window),
                                 backward_cut<D>(tensor_cores, stream_of(context).num_multiprocessors));
    if (tables.num_items == 0) return;
    p.block_tables = tables.block_tables;
    const std::int64_t num_heads = args.q.shape(1), count = args.q.shape(0) * num_heads;
    float* delta = context.scratch->allocate<float>(static_cast<std::size_t>(count));
    g.delta = delta;
    g.sums = on_device<AttentionSums>(context, sums);
    float* partials =
        context.scratch->allocate<float>(static_cast<std::size_t>(tables.partial_rows * p.num_kv_heads * p.head_dim));
    constexpr unsigned kThreads = 256;
    launch(attention_delta_kernel, dim3(static_cast<unsigned>((count * 8 + kThreads - 1) / kThreads)), dim3(kThreads),
           0, stream, g.grad_y, p.y, static_cast<int>(num_heads), p.head_dim, count, delta);
    const auto kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const dim3 rows(static_cast<unsigned>(tables.num_items), kv_heads);
    const auto num_key_items = static_cast<unsigned>(tables.num_key_items);
    if (tensor_cores) {
      using KvShape = GradKvShape<D>;
      using QShape = GradQShape<D>;
      launch(attention_grad_kv_kernel<D>, dim3(num_key_items, kv_heads, KvShape::kParts), dim3(KvShape::kThreads),
             KvShape::kSharedBytes, stream, p, g, tables.key_items);
      launch(attention_grad_q_kernel<D>, rows, dim3(QShape::Block::kThreads), QShape::kSharedBytes, stream, p, g,
             tables.items, partials);
    } else {
      using Shape = ExactBackwardShape<D>;
      launch(exact_attention_grad_kv_kernel<D>, dim3(num_key_items, kv_heads), dim3(kExactThreads), Shape::kSharedBytes,
             stream, p, g, tables.key_items);
      launch(exact_attention_grad_q_kernel<D>, rows, dim3(kExactThreads), Shape::kSharedBytes, stream, p, g,
             tables.items, partials);
    }
    if (tables.num_merges > 0)
      launch(attention_grad_q_merge_kernel, dim3(static_cast<unsigned>(tables.num_merges), kv_heads),
             dim3(kMergeRows * kWarpSize), 0, stream, p, g.grad_q, partials, tables.merges);
  });
  check_launch(args.kName);
}

}  // namespace

void register_attention_backward(OpRegistry& registry) {
  registry.add<AttentionBackwardArgs>(DeviceKind::kCuda, attention_backward);
}

}  // namespace flexcore::cuda
