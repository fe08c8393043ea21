#include "ops/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/softmax.h"
#include "backends/cpu/packed_weight.h"
#include "backends/cpu/rows.h"
#include "backends/cpu/scratch.h"
#include "ops/linear.h"
#include "ops/rows.h"

namespace flexcore::cpu {

namespace {

// A tile of 512 x 2048 logits is 4 MiB and its exponentials at most as much: both stay in the last-level cache between
// the two products. The chunk is part of the arithmetic; the rows are not.
constexpr std::int64_t kRowBlock = 512, kVocabChunk = 2048;
static_assert(kVocabChunk % kPanelRows == 0);

void require_labels(std::string_view op, const std::int32_t* labels, std::int64_t rows, std::int64_t vocab_size) {
  for (std::int64_t i = 0; i < rows; ++i)
    require(0 <= labels[i] && labels[i] < vocab_size, op, ": labels[", i, "] is ", labels[i], ", wanted in [0, ",
            vocab_size, ")");
}

/// What is carried from chunk to chunk for a block of rows.
struct RowBlock {
  TensorView hidden;  // [rows, hidden_size]
  const std::int32_t* labels;
  SoftmaxState* states;  // [rows]
  float* label_logits;   // [rows]
  TensorView weighted;   // [rows, hidden_size] float32: sum of exp(logit - max) W; empty: loss only
};

void absorb_chunk(OpContext& context, const RowBlock& block, const WeightView& weight, std::int64_t begin,
                  std::int64_t end) {
  const Arena::Scope scope(*context.scratch);
  const std::int64_t rows = block.hidden.shape(0), columns = end - begin, hidden_size = block.hidden.shape(1);
  const WeightView chunk = weight_rows(weight, begin, end);
  const bool gradient = static_cast<bool>(block.weighted);
  const TensorView logits = context.scratch->tensor(DType::kFloat32, {rows, columns});
  const LinearArgs::Member product{chunk, {}, logits, GradMode::kWrite};
  run(context, LinearArgs{block.hidden, {&product, 1}});

  const TensorView exponentials = gradient ? context.scratch->tensor(weight.dtype, {rows, columns}) : TensorView();
  context.threads->parallel_for(rows, 1, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t i = first; i < last; ++i) {
      const float* row = logits.row<const float>(i);
      if (begin <= block.labels[i] && block.labels[i] < end) block.label_logits[i] = row[block.labels[i] - begin];
      void* e = gradient ? exponentials.as<std::byte>() + i * columns * dtype_size(weight.dtype) : nullptr;
      const float factor = softmax_kernels().absorb[type_index(weight.dtype)](row, columns, &block.states[i], e);
      if (gradient && begin > 0 && factor != 1.0f)
        softmax_kernels().scale(block.weighted.row<float>(i), hidden_size, factor);
    }
  });
  if (!gradient) return;
  const LinearBackwardArgs::Member weighting{chunk, exponentials};
  run(context,
      LinearBackwardArgs{{&weighting, 1}, block.weighted, begin == 0 ? GradMode::kWrite : GradMode::kAccumulate});
}

// grad_hidden = grad_scale * (weighted / sum - W[label])
void finish_gradients(OpContext& context, const RowBlock& block, const LinearCrossEntropyArgs& args,
                      std::int64_t begin) {
  const std::int64_t rows = block.hidden.shape(0), hidden_size = block.hidden.shape(1);
  const TensorView label_rows = context.scratch->tensor(DType::kFloat32, {rows, hidden_size});
  run(context, EmbeddingArgs{args.labels.rows(begin, begin + rows), args.weight, label_rows});
  const auto finish = softmax_kernels().finish_gradient[type_index(args.grad_hidden.dtype())];
  const TensorView out = args.grad_hidden.rows(begin, begin + rows);
  const auto* scale = args.grad_scale.as<const float>() + begin;
  context.threads->parallel_for(rows, 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t i = first; i < last; ++i)
      finish(block.weighted.row<const float>(i), label_rows.row<const float>(i), hidden_size,
             static_cast<float>(1 / block.states[i].sum), scale[i],
             out.as<std::byte>() + i * out.stride(0) * static_cast<std::int64_t>(dtype_size(out.dtype())));
  });
}

void linear_cross_entropy(OpContext& context, const LinearCrossEntropyArgs& args) {
  const std::int64_t num_rows = args.hidden.shape(0), vocab_size = args.weight.out_features;
  const auto* labels = args.labels.as<const std::int32_t>();
  require_labels(args.kName, labels, num_rows, vocab_size);
  for (std::int64_t begin = 0; begin < num_rows; begin += kRowBlock) {
    const Arena::Scope scope(*context.scratch);
    const std::int64_t rows = std::min(kRowBlock, num_rows - begin);
    const RowBlock block{
        .hidden = args.hidden.rows(begin, begin + rows),
        .labels = labels + begin,
        .states = context.scratch->allocate<SoftmaxState>(rows),
        .label_logits = context.scratch->allocate<float>(rows),
        .weighted =
            args.grad_hidden ? context.scratch->tensor(DType::kFloat32, {rows, args.hidden.shape(1)}) : TensorView(),
    };
    std::fill_n(block.states, rows, SoftmaxState{});
    for (std::int64_t chunk = 0; chunk < vocab_size; chunk += kVocabChunk)
      absorb_chunk(context, block, args.weight, chunk, std::min(chunk + kVocabChunk, vocab_size));
    auto* loss = args.loss.as<float>() + begin;
    for (std::int64_t i = 0; i < rows; ++i)
      loss[i] = static_cast<float>(std::log(block.states[i].sum) + static_cast<double>(block.states[i].max) -
                                   static_cast<double>(block.label_logits[i]));
    if (args.grad_hidden) finish_gradients(context, block, args, begin);
  }
}

void cross_entropy(OpContext& context, const CrossEntropyArgs& args) {
  const std::int64_t rows = args.logits.shape(0), vocab_size = args.logits.shape(1);
  const auto* labels = args.labels.as<const std::int32_t>();
  require_labels(args.kName, labels, rows, vocab_size);
  const bool gradient = args.grad_scale.data() != nullptr;
  context.threads->parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = args.logits.row<float>(i);
      const float label_logit = row[labels[i]];
      SoftmaxState state;
      softmax_kernels().absorb[0](row, vocab_size, &state, gradient ? row : nullptr);
      args.loss.as<float>()[i] =
          static_cast<float>(std::log(state.sum) + static_cast<double>(state.max) - static_cast<double>(label_logit));
      if (!gradient) continue;
      const float scale = args.grad_scale.as<const float>()[i];
      softmax_kernels().scale(row, vocab_size, static_cast<float>(static_cast<double>(scale) / state.sum));
      row[labels[i]] -= scale;
    }
  });
}

}  // namespace

std::int64_t cross_entropy_scratch(const ScratchShape& s) {
  const std::int64_t rows = std::min(s.rows, kRowBlock), columns = std::min(s.vocab_size, kVocabChunk);
  const std::int64_t block = rows * (s.hidden_size * 4 + static_cast<std::int64_t>(sizeof(SoftmaxState)) + 4);
  const std::int64_t chunk = rows * columns * 8 + linear_scratch(rows, s.hidden_size, columns, s.num_threads, false);
  return block + std::max(chunk, rows * s.hidden_size * 4) + 1024;
}

// graph/head_ops.cpp: logits, and x without what is dropped, its gradient and its floats, beside the largest op.
std::int64_t adapted_output_scratch(const ScratchShape& s) {
  const std::int64_t rows = std::min(s.rows, logit_rows(DeviceKind::kCpu, s.vocab_size));
  ScratchShape chunk = s;
  chunk.rows = rows;
  chunk.intermediate_size = std::max(s.intermediate_size, kVocabularyChunk);
  return rows * (s.vocab_size + 3 * s.hidden_size) * 4 +
         std::max(linear_scratch(rows, s.hidden_size, s.vocab_size, s.num_threads, false), lora_scratch(chunk));
}

void register_cross_entropy(OpRegistry& registry) {
  registry.add<LinearCrossEntropyArgs>(DeviceKind::kCpu, linear_cross_entropy);
  registry.add<CrossEntropyArgs>(DeviceKind::kCpu, cross_entropy);
}

}  // namespace flexcore::cpu
