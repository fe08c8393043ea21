#include "engine/executor.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "model/rotary.h"
#include "ops/rows.h"
#include "ops/scatter.h"
#include "ops/transfer.h"

namespace flexcore {

namespace {

constexpr std::size_t kAlignment = 64;
std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::uint64_t adapter_key(const Adapter* adapter) { return adapter == nullptr ? 0 : adapter->cache_key(); }

// Copies the rows of finetune windows to their sequences' stores as the forward makes them.
class Saver final : public ProgramObserver {
 public:
  struct Window {
    TrainState* train;
    std::int64_t row_begin, row_end;  // of the batch
    std::int64_t position;
  };
  Saver(OpContext& context, std::vector<Window> windows) : context_(context), windows_(std::move(windows)) {}

  void ready(TensorId tensor, const TensorView& value) override {
    for (const auto& window : windows_) {
      const std::int64_t end = window.position + window.row_end - window.row_begin;
      for (const int index : window.train->program->saved_of_trunk[static_cast<std::size_t>(tensor)])
        run(context_, CopyArgs{value.rows(window.row_begin, window.row_end),
                               window.train->saved(static_cast<std::size_t>(index), window.position, end)});
    }
  }

 private:
  OpContext& context_;
  std::vector<Window> windows_;
};

}  // namespace

struct Executor::Layout {
  std::vector<std::size_t> order;       // groups by adapter
  std::vector<std::int64_t> row_begin;  // by group
  std::vector<AttentionSpan> spans;     // in order
  std::span<const RowGroup> groups;
  std::int64_t num_rows = 0;
  std::int64_t row_end(std::size_t group) const {
    return row_begin[group] + static_cast<std::int64_t>(groups[group].tokens.size());
  }
};

Executor::Executor(OpContext& context, DeviceRuntime& device, MemoryLedger& ledger, CompiledModel& model,
                   const WeightStore& weights, const ModelConfig& config, DType compute, const ExecutorLimits& limits)
    : context_(context),
      model_(model),
      shape_{config.hidden_size, config.num_kv_heads * config.head_dim},
      limits_(limits),
      device_(device),
      ledger_(ledger) {
  Allocator& allocator = device.allocator();
  for (const auto& param : model.base().params) {
    matrices_.push_back(param.in_features > 0 ? weights.matrix(param.name) : WeightView{});
    vectors_.push_back(param.in_features > 0 ? TensorView{} : weights.vector(param.name));
  }
  const std::int64_t page_elements = config.num_kv_heads * limits.block_size * config.head_dim;
  const std::size_t page_bytes = static_cast<std::size_t>(limits.num_blocks * page_elements) * dtype_size(compute);
  pages_buffer_ =
      Buffer(allocator, ledger, MemoryTag::kKvPages, 2 * page_bytes * static_cast<std::size_t>(config.num_layers));
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const auto half = [&](std::int64_t index) {
      return pages_buffer_.view(compute, {limits.num_blocks, config.num_kv_heads, limits.block_size, config.head_dim},
                                static_cast<std::size_t>(2 * layer + index) * page_bytes);
    };
    pages_.push_back({half(0), half(1)});
  }
  const std::int64_t half_dim = config.head_dim / 2;
  const std::size_t table_bytes = static_cast<std::size_t>(limits.max_positions * half_dim) * sizeof(float);
  rotary_ = Buffer(allocator, ledger, MemoryTag::kWorkspace, 2 * table_bytes);
  batch_.cos = rotary_.view(DType::kFloat32, {limits.max_positions, half_dim});
  batch_.sin = rotary_.view(DType::kFloat32, {limits.max_positions, half_dim}, table_bytes);
  std::vector<float> table(2 * static_cast<std::size_t>(limits.max_positions * half_dim));
  float* sines = table.data() + limits.max_positions * half_dim;
  fill_rotary_tables(config, TensorView(table.data(), DType::kFloat32, {limits.max_positions, half_dim}),
                     TensorView(sines, DType::kFloat32, {limits.max_positions, half_dim}));
  allocator.upload(rotary_.data(), table.data(), table.size() * sizeof(float));
  batch_.pages = pages_;
  lora_.resize(model.base().sites.size());
  batch_.lora = lora_;
  indices_ = Buffer(allocator, ledger, MemoryTag::kWorkspace, indices_bytes(limits));
  workspace_ = Buffer(allocator, ledger, MemoryTag::kWorkspace, model.workspace_bytes());
  losses_ = Buffer(device.pinned(), ledger, MemoryTag::kWorkspace, losses_bytes(limits));
}

std::size_t Executor::indices_bytes(const ExecutorLimits& limits) {
  return kNumIndexArrays * aligned(static_cast<std::size_t>(std::max(limits.max_rows, limits.max_sampled_rows)) * 4);
}

std::size_t Executor::losses_bytes(const ExecutorLimits& limits) {
  return aligned(static_cast<std::size_t>(limits.max_rows) * sizeof(float));
}

std::size_t Executor::workspace_bytes(const CompiledModel& model, const TrainingProgram& program,
                                      std::int64_t max_rows) {
  const std::size_t gathered =
      program.gather_bytes_per_token * static_cast<std::size_t>(max_rows) + kAlignment * (program.saved.size() + 1);
  return std::max({model.workspace_bytes(), model.trunk().workspace_bytes() + program.loss_head.workspace_bytes(),
                   aligned(program.workspace_bytes) + gathered});
}

void Executor::reserve(const TrainingProgram& program) {
  const std::size_t bytes = workspace_bytes(model_, program, limits_.max_rows);
  const std::size_t before = workspace_.bytes();
  if (bytes <= before) return;
  workspace_.reset();
  try {
    workspace_ = Buffer(device_.allocator(), ledger_, MemoryTag::kWorkspace, bytes);
  } catch (const OutOfMemory&) {
    workspace_ = Buffer(device_.allocator(), ledger_, MemoryTag::kWorkspace, before);  // serving goes on
    throw;
  }
}

TensorView Executor::index_array(IndexArray which, DType dtype, std::int64_t size) const {
  const std::size_t slot = indices_.bytes() / kNumIndexArrays;
  return indices_.view(dtype, {size}, static_cast<std::size_t>(which) * slot);
}

template <class T>
TensorView Executor::staged(IndexArray which, DType dtype, const std::vector<T>& table) {
  static_assert(sizeof(T) == 4);
  const TensorView array = index_array(which, dtype, static_cast<std::int64_t>(table.size()));
  run(context_, StageArgs{array.data(), table.data(), array.bytes()});
  return array;
}

RunState Executor::state() const { return {&context_, &batch_, matrices_, vectors_}; }

void Executor::clear_segments() {
  for (const auto site : sites_in_use_) lora_[static_cast<std::size_t>(site)].clear();
  sites_in_use_.clear();
}

void Executor::add_segments(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients) {
  for (const auto& module : adapter.modules) {
    auto& segments = lora_[static_cast<std::size_t>(module.site)];
    if (segments.empty()) sites_in_use_.push_back(module.site);
    segments.push_back(adapter.segment(module, begin, end, gradients));
  }
}

Executor::Layout Executor::lay_out(std::span<const RowGroup> groups) {
  Layout layout;
  layout.groups = groups;
  layout.order.resize(groups.size());
  std::iota(layout.order.begin(), layout.order.end(), std::size_t{0});
  std::stable_sort(layout.order.begin(), layout.order.end(), [&](std::size_t a, std::size_t b) {
    return adapter_key(groups[a].adapter) < adapter_key(groups[b].adapter);
  });
  layout.row_begin.resize(groups.size());
  for (const auto& group : groups) layout.num_rows += static_cast<std::int64_t>(group.tokens.size());
  require<Error>(layout.num_rows <= limits_.max_rows, "forward: ", layout.num_rows, " rows, wanted at most ",
                 limits_.max_rows);
  std::vector<std::int32_t> tokens, positions;
  clear_segments();
  std::int64_t row = 0, segment_begin = 0;
  for (std::size_t i = 0; i < layout.order.size(); ++i) {
    const auto& group = groups[layout.order[i]];
    layout.row_begin[layout.order[i]] = row;
    const std::int64_t end = row + static_cast<std::int64_t>(group.tokens.size());
    tokens.insert(tokens.end(), group.tokens.begin(), group.tokens.end());
    for (std::int64_t i = row; i < end; ++i) positions.push_back(static_cast<std::int32_t>(group.position + i - row));
    layout.spans.push_back({row, end, group.position, group.block_table});
    row = end;
    const bool last = i + 1 == layout.order.size() || groups[layout.order[i + 1]].adapter != group.adapter;
    if (last) {
      if (group.adapter != nullptr) add_segments(*group.adapter, segment_begin, row, nullptr);
      segment_begin = row;
    }
  }
  batch_.token_ids = staged(IndexArray::kTokens, DType::kInt32, tokens);
  batch_.positions = staged(IndexArray::kPositions, DType::kInt32, positions);
  batch_.spans = layout.spans;
  return layout;
}

TensorView Executor::forward(std::span<const RowGroup> groups) {
  outcomes_.clear();
  const Layout layout = lay_out(groups);
  if (layout.num_rows == 0) return {};
  std::vector<Saver::Window> windows;
  for (std::size_t g = 0; g < groups.size(); ++g)
    if (groups[g].train != nullptr)
      windows.push_back({groups[g].train, layout.row_begin[g], layout.row_end(g), groups[g].position});
  Saver saver(context_, windows);
  const RowCounts rows = {layout.num_rows, 0, 0};
  model_.trunk().run(state(), rows, workspace_.data(), {}, windows.empty() ? nullptr : &saver);
  const TensorView hidden = model_.trunk().value(model_.hidden(), rows, workspace_.data(), {});
  run_loss(layout, hidden);
  run_score(layout, hidden);
  return run_sample(layout, hidden);
}

TensorView Executor::run_sample(const Layout& layout, const TensorView& hidden) {
  std::int64_t count = 0;
  for (const auto& group : layout.groups) count += group.sampled;
  if (count == 0) return {};
  require<Error>(count <= limits_.max_sampled_rows, "forward: ", count, " sampled rows, wanted at most ",
                 limits_.max_sampled_rows);
  std::vector<std::int32_t> sampled;
  for (std::size_t g = 0; g < layout.groups.size(); ++g)
    for (std::int64_t i = layout.groups[g].sampled; i > 0; --i)
      sampled.push_back(static_cast<std::int32_t>(layout.row_end(g) - i));
  batch_.sampled_rows = staged(IndexArray::kRows, DType::kInt32, sampled);
  const RowCounts rows = {layout.num_rows, count, 0};
  std::byte* workspace = head_workspace();
  model_.sample_head().run(state(), rows, workspace, {&hidden, 1});
  return model_.sample_head().value(model_.logits(), rows, workspace, {&hidden, 1});
}

std::byte* Executor::head_workspace() const { return workspace_.data() + model_.trunk().workspace_bytes(); }

void Executor::run_loss(const Layout& layout, const TensorView& hidden) {
  // offsets: where each window's rows with a target are in the window; the scatter's index.
  std::vector<std::int32_t> rows, labels, offsets;
  std::vector<float> scale;
  std::vector<std::pair<std::size_t, std::int64_t>> windows;  // group, targets
  const TrainingProgram* program = nullptr;
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const auto& group = layout.groups[g];
    if (group.train == nullptr) continue;
    program = group.train->program;
    const auto& all = group.train->example->labels;
    std::int64_t count = 0;
    for (std::size_t i = 0; i < group.tokens.size(); ++i) {
      const std::size_t next = static_cast<std::size_t>(group.position) + i + 1;
      if (next >= all.size() || all[next] == -100) continue;
      rows.push_back(static_cast<std::int32_t>(layout.row_begin[g] + static_cast<std::int64_t>(i)));
      labels.push_back(all[next]);
      scale.push_back(group.train->grad_scale);
      offsets.push_back(static_cast<std::int32_t>(i));
      ++count;
    }
    windows.emplace_back(g, count);
  }
  if (windows.empty()) return;
  const auto total = static_cast<std::int64_t>(offsets.size());
  const RowCounts counts = {layout.num_rows, 0, total};
  TensorView grads, index;
  if (total > 0) {
    batch_.target_rows = staged(IndexArray::kRows, DType::kInt32, rows);
    batch_.labels = staged(IndexArray::kLabels, DType::kInt32, labels);
    batch_.grad_scale = staged(IndexArray::kScale, DType::kFloat32, scale);
    index = staged(IndexArray::kOffsets, DType::kInt32, offsets);
    batch_.loss = index_array(IndexArray::kLoss, DType::kFloat32, total);
    program->loss_head.run(state(), counts, head_workspace(), {&hidden, 1});
    grads = program->loss_head.value(program->target_grad, counts, head_workspace(), {&hidden, 1});
    fetch_losses(total);
  }
  std::int64_t begin = 0;
  for (const auto& [g, count] : windows) {
    const auto& group = layout.groups[g];
    const std::int64_t end = group.position + static_cast<std::int64_t>(group.tokens.size());
    const TensorView store = group.train->grad_hidden(group.position, end);
    run(context_, ZeroArgs{store});
    if (count == 0) continue;
    run(context_, ScatterRowsArgs{grads.rows(begin, begin + count), index.rows(begin, begin + count), store});
    outcomes_.push_back({group.train, nullptr, begin, begin + count});
    begin += count;
  }
}

void Executor::run_score(const Layout& layout, const TensorView& hidden) {
  std::vector<std::int32_t> rows, labels;
  for (std::size_t g = 0; g < layout.groups.size(); ++g)
    for (std::size_t i = 0; i < layout.groups[g].score_labels.size(); ++i) {
      rows.push_back(static_cast<std::int32_t>(layout.row_begin[g] + static_cast<std::int64_t>(i)));
      labels.push_back(layout.groups[g].score_labels[i]);
    }
  if (rows.empty()) return;
  require<Error>(outcomes_.empty(), "forward: a batch with losses and scores");
  const auto total = static_cast<std::int64_t>(rows.size());
  batch_.target_rows = staged(IndexArray::kRows, DType::kInt32, rows);
  batch_.labels = staged(IndexArray::kLabels, DType::kInt32, labels);
  batch_.grad_scale = {};
  batch_.loss = index_array(IndexArray::kLoss, DType::kFloat32, total);
  model_.score_head().run(state(), {layout.num_rows, 0, total}, head_workspace(), {&hidden, 1});
  fetch_losses(total);
  std::int64_t begin = 0;
  for (const auto& group : layout.groups) {
    const std::int64_t end = begin + static_cast<std::int64_t>(group.score_labels.size());
    if (end > begin) outcomes_.push_back({nullptr, group.score, begin, end});
    begin = end;
  }
}

void Executor::fetch_losses(std::int64_t count) {
  run(context_, FetchArgs{losses_.data(), batch_.loss.data(), static_cast<std::size_t>(count) * sizeof(float)});
}

void Executor::finish_forward() {
  device_.synchronize();
  const auto* losses = reinterpret_cast<const float*>(losses_.data());
  for (const auto& outcome : outcomes_) {
    if (outcome.train != nullptr)
      outcome.train->loss_sum += std::accumulate(losses + outcome.begin, losses + outcome.end, 0.0);
    else
      std::transform(losses + outcome.begin, losses + outcome.end, outcome.score, std::negate<>());
  }
  outcomes_.clear();
}

void Executor::backward(int layer, std::span<const BackwardRows> unsorted) {
  std::vector<BackwardRows> all(unsorted.begin(), unsorted.end());
  std::stable_sort(all.begin(), all.end(), [](const BackwardRows& a, const BackwardRows& b) {
    return a.train->adapter->cache_key() < b.train->adapter->cache_key();
  });
  TrainingProgram& program = *all.front().train->program;
  const auto& unit = program.layers[static_cast<std::size_t>(layer)];
  std::int64_t total = 0;
  for (const auto& rows : all) total += rows.end - rows.begin;
  require<Error>(total <= limits_.max_rows, "backward: ", total, " rows, wanted at most ", limits_.max_rows);

  clear_segments();
  std::vector<std::int32_t> tokens, positions;
  std::vector<AttentionBackwardSpan> spans;
  std::int64_t row = 0, segment_begin = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    TrainState& train = *all[i].train;
    const auto [begin, end] = std::pair(all[i].begin, all[i].end);
    if (end == train.length()) run(context_, ZeroArgs{train.kv_gradients()});
    tokens.insert(tokens.end(), train.example->input_ids.begin() + begin, train.example->input_ids.begin() + end);
    for (std::int64_t i = begin; i < end; ++i) positions.push_back(static_cast<std::int32_t>(i));
    spans.push_back({{row, row + end - begin, begin, train.block_table->data()}, train.grad_k(), train.grad_v()});
    row += end - begin;
    if (i + 1 == all.size() || all[i + 1].train->adapter != train.adapter) {
      add_segments(*train.adapter, segment_begin, row, train.gradients);
      segment_begin = row;
    }
  }
  batch_.token_ids = staged(IndexArray::kTokens, DType::kInt32, tokens);
  batch_.positions = staged(IndexArray::kPositions, DType::kInt32, positions);
  batch_.backward_spans = spans;

  // One window is read and written where it is stored; several are brought together.
  std::vector<TensorView> inputs;
  const bool single = all.size() == 1;
  std::byte* gathered = workspace_.data() + aligned(program.workspace_bytes);
  for (std::size_t i = 0; i < unit.saved.size() + 1; ++i) {
    const auto view = [&](const BackwardRows& rows) {
      return i == 0 ? rows.train->grad_hidden(rows.begin, rows.end)
                    : rows.train->saved(static_cast<std::size_t>(unit.saved[i - 1]), rows.begin, rows.end);
    };
    const TensorView first = view(all.front());
    if (single) {
      inputs.push_back(first);
      continue;
    }
    inputs.emplace_back(gathered, first.dtype(), std::initializer_list<std::int64_t>{total, first.shape(1)});
    gathered += aligned(inputs.back().bytes());
    std::int64_t at = 0;
    for (const auto& rows : all) {
      run(context_, CopyArgs{view(rows), inputs.back().rows(at, at + rows.end - rows.begin)});
      at += rows.end - rows.begin;
    }
  }
  const RowCounts counts = {total, 0, 0};
  unit.program.run(state(), counts, workspace_.data(), inputs);
  if (unit.grad_out == kNoTensor) return;
  const TensorView out = unit.program.value(unit.grad_out, counts, workspace_.data(), inputs);
  std::int64_t at = 0;
  for (const auto& rows : all) {
    const TensorView store = rows.train->grad_hidden(rows.begin, rows.end);
    const TensorView part = out.rows(at, at + rows.end - rows.begin);
    if (part.data() != store.data()) run(context_, CopyArgs{part, store});
    at += rows.end - rows.begin;
  }
}

}  // namespace flexcore
