#include <algorithm>

#include "backends/cuda/families.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/kernels/cross_entropy.cuh"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/scratch.h"
#include "backends/cuda/views.h"
#include "core/number.h"
#include "ops/cross_entropy.h"

namespace flexcore::cuda {

namespace {

// The least tokens of a chunk and rows of a block: enough tiles for every multiprocessor in both products.
constexpr std::int64_t kLeastChunk = 1024, kLeastRows = 128, kChunkMultiple = 256;
// Least columns of a part, when one row is shared by several blocks.
constexpr std::int64_t kLeastPart = 1024;
constexpr std::size_t kSlotBytes = 2 * kWarpSize * sizeof(float);

/// How the logits are cut. Part of the arithmetic, so it does not depend on whether gradients are wanted.
struct Cuts {
  std::int64_t rows;   // of a block
  std::int64_t chunk;  // tokens
  int parts;           // blocks that share a row
};

// Logits and exponentials of a chunk are as large as the second-level cache: they need not leave it between kernels,
// and with few rows the whole vocabulary is one chunk. On an H200 (50 MiB): at most 8,500 rows, and 16 rows of 546,000
// tokens.
Cuts cut(const OpContext& context, std::int64_t rows, const WeightView& weight) {
  const Stream& stream = stream_of(context);
  const auto fit = static_cast<std::int64_t>(stream.l2_bytes / (sizeof(float) + dtype_size(weight.dtype)));  // logits
  rows = std::min(rows, std::max(kLeastRows, fit / kLeastChunk));
  const std::int64_t chunk =
      std::min(weight.out_features, std::max(kLeastChunk, fit / rows / kChunkMultiple * kChunkMultiple));
  const std::int64_t wanted = divide_up(2 * stream.num_multiprocessors, rows);
  return {rows, chunk, static_cast<int>(std::min(wanted, divide_up(chunk, kLeastPart)))};
}

/// What is carried from chunk to chunk for a block of rows.
struct RowBlock {
  TensorView hidden;  // [rows, hidden_size] in the weight's dtype
  const std::int32_t* labels;
  SoftmaxState* states;  // [rows, parts]
  float* label_logits;   // [rows]
  TensorView weighted;   // [rows, hidden_size] float32: sum of exp(logit - max) W; empty: loss only
};

// Rows begin where packs and the GEMM library want them.
TensorView padded_matrix(OpContext& context, DType dtype, std::int64_t rows, std::int64_t columns) {
  const std::int64_t stride = divide_up(columns, kPackElements) * kPackElements;
  TensorView t(context.scratch->tensor(dtype, {rows, stride}).data(), dtype, {rows, columns});
  t.set_stride(0, stride);
  return t;
}

void absorb_chunk(OpContext& context, const RowBlock& block, const TensorView& weight, std::int64_t begin,
                  std::int64_t end, int parts) {
  const Arena::Scope scope(*context.scratch);
  const std::int64_t rows = block.hidden.shape(0), columns = end - begin;
  const TensorView tokens = weight.rows(begin, end);
  const bool gradient = static_cast<bool>(block.weighted), first = begin == 0;
  const TensorView logits = padded_matrix(context, DType::kFloat32, rows, columns);
  gemm(context, {.a = block.hidden, .b = tokens, .c = logits, .transpose_b = true});

  const std::int64_t part_width = divide_up(divide_up(columns, parts), kPackElements) * kPackElements;
  const LogitChunk chunk{logits.as<const float>(), logits.stride(0), static_cast<int>(columns),
                         static_cast<int>(part_width)};
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(parts));
  float* maxima = nullptr;
  if (parts > 1) {
    maxima = context.scratch->allocate<float>(static_cast<std::size_t>(rows * parts));
    launch(chunk_max_kernel, grid, dim3(kSoftmaxThreads), kSlotBytes, handle_of(context), chunk, maxima);
    check_launch(LinearCrossEntropyArgs::kName);
  }
  const TensorView exponentials = gradient ? padded_matrix(context, weight.dtype(), rows, columns) : TensorView();
  const AbsorbChunk absorb{.chunk = chunk,
                           .maxima = maxima,
                           .exponentials = gradient ? rows_of(exponentials) : Rows{},
                           .weighted = gradient && !first ? block.weighted.as<float>() : nullptr,
                           .weighted_stride = gradient ? block.weighted.stride(0) : 0,
                           .width = static_cast<int>(weight.shape(1)),
                           .labels = block.labels,
                           .first_token = begin,
                           .first = first,
                           .states = block.states,
                           .label_logits = block.label_logits};
  launch(absorb_chunk_kernel, grid, dim3(kSoftmaxThreads), kSlotBytes, handle_of(context), absorb);
  check_launch(LinearCrossEntropyArgs::kName);
  if (gradient) gemm(context, {.a = exponentials, .b = tokens, .c = block.weighted, .accumulate = !first});
}

void finish(OpContext& context, const RowBlock& block, const TensorView& weight, const LinearCrossEntropyArgs& args,
            std::int64_t begin, int parts) {
  const std::int64_t rows = block.hidden.shape(0), width = weight.shape(1);
  const bool gradient = static_cast<bool>(args.grad_hidden);
  const TensorView grad = gradient ? args.grad_hidden.rows(begin, begin + rows) : TensorView();
  const FinishCrossEntropy finish{.states = block.states,
                                  .parts = parts,
                                  .label_logits = block.label_logits,
                                  .labels = block.labels,
                                  .loss = args.loss.as<float>() + begin,
                                  .weighted = gradient ? rows_of(block.weighted) : Rows{},
                                  .weight = rows_of(weight),
                                  .vocab_size = weight.shape(0),
                                  .scale = gradient ? args.grad_scale.as<const float>() + begin : nullptr,
                                  .grad = gradient ? rows_of(grad) : Rows{},
                                  .width = static_cast<int>(width)};
  const bool packs = gradient && all_packs(width, block.weighted, weight, grad);
  launch(packs ? finish_cross_entropy_kernel<kPackElements> : finish_cross_entropy_kernel<1>,
         dim3(static_cast<unsigned>(rows)), dim3(kSoftmaxThreads), 0, handle_of(context), finish);
  check_launch(args.kName);
}

// Per chunk: a product, the softmax kernels, a product. The floor is 4 rows vocab_size hidden_size operations, or two
// readings of the weight.
void linear_cross_entropy(OpContext& context, const LinearCrossEntropyArgs& args) {
  const std::int64_t num_rows = args.hidden.shape(0), vocab_size = args.weight.out_features,
                     hidden_size = args.weight.in_features;
  const TensorView weight(const_cast<void*>(args.weight.data), args.weight.dtype, {vocab_size, hidden_size});
  if (num_rows == 0) return;
  const auto [row_block, chunk_size, parts] = cut(context, num_rows, args.weight);
  for (std::int64_t begin = 0; begin < num_rows; begin += row_block) {
    const Arena::Scope scope(*context.scratch);
    const std::int64_t rows = std::min(row_block, num_rows - begin);
    RowBlock block{
        .hidden = args.hidden.rows(begin, begin + rows),
        .labels = args.labels.as<const std::int32_t>() + begin,
        .states = context.scratch->allocate<SoftmaxState>(static_cast<std::size_t>(rows * parts)),
        .label_logits = context.scratch->allocate<float>(static_cast<std::size_t>(rows)),
        .weighted = {},
    };
    if (block.hidden.dtype() != weight.dtype()) {
      const TensorView converted = padded_matrix(context, weight.dtype(), rows, hidden_size);
      map_rows(CopyRows{rows_of(block.hidden), rows_of(converted), nullptr, 0, false}, rows, hidden_size,
               all_packs(hidden_size, block.hidden, converted), handle_of(context));
      check_launch(args.kName);
      block.hidden = converted;
    }
    // The sums grow where the gradient will be, if it can hold them.
    if (args.grad_hidden)
      block.weighted = args.grad_hidden.dtype() == DType::kFloat32
                           ? args.grad_hidden.rows(begin, begin + rows)
                           : padded_matrix(context, DType::kFloat32, rows, hidden_size);
    for (std::int64_t first = 0; first < vocab_size; first += chunk_size)
      absorb_chunk(context, block, weight, first, std::min(first + chunk_size, vocab_size), parts);
    finish(context, block, weight, args, begin, parts);
  }
}

void cross_entropy(OpContext& context, const CrossEntropyArgs& args) {
  const std::int64_t rows = args.logits.shape(0);
  if (rows == 0) return;
  launch(row_cross_entropy_kernel, dim3(static_cast<unsigned>(rows)), dim3(kSoftmaxThreads), kSlotBytes,
         handle_of(context),
         RowCrossEntropy{.logits = args.logits.as<float>(),
                         .stride = args.logits.stride(0),
                         .columns = args.logits.shape(1),
                         .labels = args.labels.as<const std::int32_t>(),
                         .loss = args.loss.as<float>(),
                         .scale = args.grad_scale.as<const float>()});
  check_launch(args.kName);
}

}  // namespace

std::int64_t cross_entropy_scratch(const ScratchShape& s, const DeviceSize& device) {
  const std::int64_t rows = std::min(s.rows, std::max(kLeastRows, device.l2_bytes / (6 * kLeastChunk)));
  const std::int64_t logits = std::max(device.l2_bytes, rows * (kLeastChunk + kPackElements) * 8);
  return logits + rows * (2 * s.hidden_size + 2 * kPackElements) * 4 + (rows + 2 * device.num_multiprocessors) * 32 +
         kGemmWorkspaceBytes;
}

// graph/head_ops.cpp: logits, and x without what is dropped, its gradient and its floats, beside the largest op.
std::int64_t adapted_output_scratch(const ScratchShape& s) {
  const std::int64_t rows = std::min(s.rows, logit_rows(DeviceKind::kCuda, s.vocab_size));
  ScratchShape chunk = s;
  chunk.rows = rows;
  chunk.intermediate_size = std::max(s.intermediate_size, kVocabularyChunk);
  return rows * (s.vocab_size + 3 * s.hidden_size) * 4 +
         std::max(kGemmWorkspaceBytes + rows * s.vocab_size * 4, lora_scratch(chunk, true));
}

void register_cross_entropy(OpRegistry& registry) {
  registry.add<LinearCrossEntropyArgs>(DeviceKind::kCuda, linear_cross_entropy);
  registry.add<CrossEntropyArgs>(DeviceKind::kCuda, cross_entropy);
}

}  // namespace flexcore::cuda
