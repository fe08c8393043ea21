#include <algorithm>
#include <utility>

#include "core/check.h"
#include "engine/executor.h"
#include "graph/embedding_bypass.h"
#include "ops/rows.h"

namespace flexcore {

struct Executor::BackwardLayout {
  std::vector<BackwardRows> parts;  // by adapter, one after the other in the batch
  std::int64_t num_rows = 0;
  std::vector<AttentionBackwardSpan> spans;
  std::vector<AttentionSpan> forward_spans;  // for attention that is recomputed
};

Executor::BackwardLayout Executor::lay_out_backward(std::span<const BackwardRows> rows) {
  BackwardLayout layout;
  auto& parts = layout.parts;
  parts.assign(rows.begin(), rows.end());
  std::stable_sort(parts.begin(), parts.end(), [](const BackwardRows& a, const BackwardRows& b) {
    return a.train->adapter->cache_key() < b.train->adapter->cache_key();
  });
  backward_.clear_segments();
  std::vector<std::int32_t> tokens, positions;
  std::int64_t row = 0, segment_begin = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    TrainState& train = *parts[i].train;
    const auto [begin, end] = std::pair(parts[i].begin, parts[i].end);
    if (end == train.length()) run(backward_.context(), ZeroArgs{train.kv_gradients()});
    for (std::int64_t t = begin; t < end; ++t) {
      tokens.push_back(std::max(train.tokens[static_cast<std::size_t>(t)], 0));
      positions.push_back(static_cast<std::int32_t>(t));
    }
    const std::int64_t first = std::exchange(row, row + end - begin);
    backward_.add_virtual_rows(train.adapter.get(), begin, first, row, train.gradients);
    layout.spans.push_back({{first, row, begin, train.block_table->data()}, train.grad_k(), train.grad_v()});
    layout.forward_spans.push_back(layout.spans.back().span);
    const bool drops = train.dropout.p > 0.0;
    if (i + 1 == parts.size() || parts[i + 1].train->adapter != train.adapter || drops) {
      add_segment(backward_, {train.adapter.get(), segment_begin, row, drops ? &train : nullptr, begin},
                  train.gradients);
      segment_begin = row;
    }
  }
  layout.num_rows = row;
  require<Error>(row <= limits_.max_rows, "backward: ", row, " rows, wanted at most ", limits_.max_rows);
  backward_.batch.token_ids = backward_.staged(IndexArray::kTokens, DType::kInt32, tokens);
  backward_.batch.positions = backward_.staged(IndexArray::kPositions, DType::kInt32, positions);
  return layout;
}

// One window is read where it is stored; several are brought together, codes made numbers again, and what is in host
// memory comes to the device, once: a GPU's kernels read page-locked memory over the bus at any address (CUDA
// Programming Guide, unified virtual addressing).
std::vector<TensorView> Executor::gather(const BackwardLayout& layout, const TrainingProgram& program,
                                         const TrainingProgram::Layer& unit) {
  std::vector<TensorView> inputs;
  std::byte* gathered = backward_.workspace() + Lane::aligned(program.workspace_bytes);
  for (std::size_t i = 0; i < unit.saved.size() + 1; ++i) {
    const auto view = [&](const BackwardRows& rows) {
      return i == 0 ? rows.train->grad_hidden(rows.begin, rows.end)
                    : rows.train->saved(static_cast<std::size_t>(unit.saved[i - 1]), rows.begin, rows.end);
    };
    const TensorView first = view(layout.parts.front());
    const bool codes = first.dtype() == DType::kUInt8;
    const SavedTensor* saved = i == 0 ? nullptr : &program.saved[static_cast<std::size_t>(unit.saved[i - 1])];
    if (layout.parts.size() == 1 && !codes && (saved == nullptr || !saved->in_host)) {
      inputs.push_back(first);
      continue;
    }
    inputs.emplace_back(gathered, codes ? saved->read_dtype : first.dtype(),
                        std::initializer_list<std::int64_t>{layout.num_rows, codes ? saved->width : first.shape(1)});
    gathered += Lane::aligned(inputs.back().bytes());
    std::int64_t at = 0;
    for (const auto& rows : layout.parts) {
      const TensorView part = inputs.back().rows(at, at + rows.end - rows.begin);
      codes ? run(backward_.context(), LoadRowsArgs{view(rows), part})
            : run(backward_.context(), CopyArgs{view(rows), part});
      at += rows.end - rows.begin;
    }
  }
  return inputs;
}

void Executor::store_gradients(const BackwardLayout& layout, const TensorView& out, bool of_embeddings) {
  if (of_embeddings)
    add_embedding_gradients(backward_.context(), backward_.batch, model_.base().site_at(LinearSite::Place::kEmbedding),
                            out);
  std::int64_t at = 0;
  for (const auto& rows : layout.parts) {
    const std::int64_t count = rows.end - rows.begin;
    const TensorView store = rows.train->grad_hidden(rows.begin, rows.end);
    const TensorView part = out.rows(at, at + count);
    at += count;
    if (part.data() != store.data()) run(backward_.context(), CopyArgs{part, store});
    if (!of_embeddings) continue;
    const auto virtual_part = rows.train->adapter->virtual_rows(rows.begin, 0, count, rows.train->gradients);
    if (virtual_part && virtual_part->prompt)
      run(backward_.context(),
          CopyArgs{store.rows(virtual_part->begin, virtual_part->end), virtual_part->grad, GradMode::kAccumulate});
  }
}

void Executor::backward(int layer, std::span<const BackwardRows> rows) {
  const BatchIdentity batch(backward_.context(), ++num_batches_);
  const BackwardLayout layout = lay_out_backward(rows);
  backward_.batch.backward_spans = layout.spans;
  backward_.batch.spans = layout.forward_spans;
  TrainingProgram& program = *layout.parts.front().train->program;
  const auto& unit = program.layers[static_cast<std::size_t>(layer)];
  const auto inputs = gather(layout, program, unit);
  const RowCounts counts = {layout.num_rows, 0, 0};
  unit.program.run(state(backward_), counts, backward_.workspace(), inputs);
  if (unit.grad_out == kNoTensor) return;
  // The gradient of the first layer's input is that of the embeddings.
  store_gradients(layout, unit.program.value(unit.grad_out, counts, backward_.workspace(), inputs), layer == 0);
}

void Executor::finish_backward() { device_.synchronize(backward_.context().stream); }

}  // namespace flexcore
