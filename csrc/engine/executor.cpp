#include "engine/executor.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "model/rotary.h"
#include "ops/rows.h"
#include "ops/scatter.h"

namespace flexcore {

namespace {

std::uint64_t adapter_key(const Adapter* adapter) { return adapter == nullptr ? 0 : adapter->cache_key(); }

// Copies the rows of finetune windows to their sequences' stores as the forward makes them.
class Saver final : public ProgramObserver {
 public:
  Saver(OpContext& context, const TrainingProgram& program, std::span<const SaveSpan> device,
        std::span<const SaveSpan> host)
      : context_(context), program_(program), device_(device), host_(host) {}

  void ready(TensorId tensor, const TensorView& value) override {
    for (const int index : program_.saved_of_trunk[static_cast<std::size_t>(tensor)]) {
      const SavedTensor& saved = program_.saved[static_cast<std::size_t>(index)];
      run(context_, SaveRowsArgs{value, saved.in_host ? host_ : device_, saved.dtype, saved.offset});
    }
  }

 private:
  OpContext& context_;
  const TrainingProgram& program_;
  std::span<const SaveSpan> device_, host_;
};

// For windows of several programs.
class Savers final : public ProgramObserver {
 public:
  void add(const Saver& saver) { savers_.push_back(saver); }
  bool empty() const { return savers_.empty(); }
  void ready(TensorId tensor, const TensorView& value) override {
    for (auto& saver : savers_) saver.ready(tensor, value);
  }

 private:
  std::vector<Saver> savers_;
};

constexpr std::size_t kMostFixedSpans = 256, kMostFixedWindows = 64;

// Few sizes, so that few are recorded; close to the rows that there are, as those behind them cost their GEMMs' time.
std::int64_t round_rows(std::int64_t rows) {
  if (rows <= 8) return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(rows)));
  const std::int64_t step = rows <= 64 ? 8 : 32;
  return (rows + step - 1) / step * step;
}

}  // namespace

struct Executor::Layout {
  std::vector<std::size_t> order;       // groups by adapter
  std::vector<std::int64_t> row_begin;  // by group
  std::span<const RowGroup> groups;
  std::int64_t num_rows = 0;  // of groups and, in a batch of fixed size, behind them
  std::int64_t num_sampled = 0;
  bool fixed = false;
  RecordedKey key;
  std::int64_t row_end(std::size_t group) const {
    return row_begin[group] + static_cast<std::int64_t>(groups[group].tokens.size());
  }
};

Executor::Executor(OpContext& context, DeviceRuntime& device, MemoryLedger& ledger, CompiledModel& model,
                   const WeightStore& weights, const ModelConfig& config, DType compute, const ExecutorLimits& limits,
                   const ScratchBytes& scratch, bool record)
    : model_(model),
      shape_{config.hidden_size, config.num_kv_heads * config.head_dim},
      limits_(limits),
      device_(device),
      ledger_(ledger),
      forward_(context, device.allocator(), ledger, limits, model.base()),
      beside_(device.second_stream() == nullptr
                  ? nullptr
                  : std::make_unique<Lane>(context, device.second_stream(), device.allocator(), ledger, limits,
                                           model.base(), static_cast<std::size_t>(scratch.backward))),
      backward_(beside_ != nullptr ? *beside_ : forward_),
      record_(record && device.records()) {
  Allocator& allocator = device.allocator();
  for (const auto& param : model.base().params) {
    matrices_.push_back(param.in_features > 0 ? weights.matrix(param.name) : WeightView{});
    vectors_.push_back(param.in_features > 0 ? TensorView{} : weights.vector(param.name));
  }
  // Block after block, in each the keys and the values of every layer: a block is one piece of memory.
  const std::int64_t half_elements = config.num_kv_heads * limits.block_size * config.head_dim,
                     block_elements = 2 * config.num_layers * half_elements;
  block_bytes_ = static_cast<std::size_t>(block_elements) * dtype_size(compute);
  pages_buffer_ =
      Buffer(allocator, ledger, MemoryTag::kKvPages, static_cast<std::size_t>(limits.num_blocks) * block_bytes_);
  if (limits.num_host_blocks > 0)
    host_pages_ = Buffer(device.pinned(), ledger, MemoryTag::kSwapSpace,
                         static_cast<std::size_t>(limits.num_host_blocks) * block_bytes_);
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const auto half = [&](std::int64_t index) {
      std::byte* first =
          pages_buffer_.data() + static_cast<std::size_t>((2 * layer + index) * half_elements) * dtype_size(compute);
      TensorView pages(first, compute, {limits.num_blocks, config.num_kv_heads, limits.block_size, config.head_dim});
      pages.set_stride(0, block_elements);
      return pages;
    };
    pages_.push_back({half(0), half(1)});
  }
  const std::int64_t half_dim = config.head_dim / 2;
  const std::size_t table_bytes = static_cast<std::size_t>(limits.max_positions * half_dim) * sizeof(float);
  rotary_ = Buffer(allocator, ledger, MemoryTag::kWorkspace, 2 * table_bytes);
  std::vector<float> table(2 * static_cast<std::size_t>(limits.max_positions * half_dim));
  float* sines = table.data() + limits.max_positions * half_dim;
  fill_rotary_tables(config, TensorView(table.data(), DType::kFloat32, {limits.max_positions, half_dim}),
                     TensorView(sines, DType::kFloat32, {limits.max_positions, half_dim}));
  allocator.upload(rotary_.data(), table.data(), table.size() * sizeof(float));
  for (Lane* lane : {&forward_, &backward_}) {
    lane->batch.cos = rotary_.view(DType::kFloat32, {limits.max_positions, half_dim});
    lane->batch.sin = rotary_.view(DType::kFloat32, {limits.max_positions, half_dim}, table_bytes);
    lane->batch.pages = pages_;
  }
  forward_.reserve_workspace(model.workspace_bytes());
  losses_ = Buffer(device.pinned(), ledger, MemoryTag::kWorkspace, losses_bytes(limits));
  spans_.reserve(std::max(static_cast<std::size_t>(limits.max_rows), kMostFixedSpans));
}

void Executor::move_blocks(std::span<const BlockMove> moves) {
  if (moves.empty()) return;
  for (const auto& [from, to] : moves) device_.allocator().copy(block(to), block(from), block_bytes_);
  device_.synchronize(forward_.context().stream);  // backwards read them on a stream of their own
}

void Executor::abandon() {
  outcomes_.clear();
  device_.synchronize(forward_.context().stream);
  if (beside_ != nullptr) device_.synchronize(beside_->context().stream);
}

std::size_t Executor::losses_bytes(const ExecutorLimits& limits) {
  return Lane::aligned(static_cast<std::size_t>(limits.max_rows) * sizeof(float));
}

Executor::LaneBytes Executor::lane_bytes(const CompiledModel& model, const TrainingProgram& program,
                                         std::int64_t max_rows) {
  const std::size_t gathered = program.gather_bytes_per_token * static_cast<std::size_t>(max_rows) +
                               Lane::kAlignment * (program.saved.size() + 1);
  return {std::max(model.workspace_bytes(), model.trunk().workspace_bytes() + program.loss_head.workspace_bytes()),
          Lane::aligned(program.workspace_bytes) + gathered};
}

std::size_t Executor::workspace_bytes(const CompiledModel& model, const TrainingProgram& program, std::int64_t max_rows,
                                      bool two_lanes) {
  const LaneBytes bytes = lane_bytes(model, program, max_rows);
  return two_lanes ? bytes.forward + bytes.backward : std::max(bytes.forward, bytes.backward);
}

void Executor::reserve(const TrainingProgram& program) {
  const LaneBytes bytes = lane_bytes(model_, program, limits_.max_rows);
  const std::size_t forward = beside_ != nullptr ? bytes.forward : std::max(bytes.forward, bytes.backward);
  if (forward > forward_.workspace_bytes()) recorded_.clear();  // the workspace moves, even where it cannot grow
  forward_.reserve_workspace(forward);
  if (beside_ != nullptr) beside_->reserve_workspace(bytes.backward);
}

RunState Executor::state(Lane& lane) const { return {&lane.context(), &lane.batch, matrices_, vectors_}; }

Executor::Layout Executor::lay_out(std::span<const RowGroup> groups) {
  Layout layout;
  layout.groups = groups;
  layout.order.resize(groups.size());
  std::iota(layout.order.begin(), layout.order.end(), std::size_t{0});
  std::stable_sort(layout.order.begin(), layout.order.end(), [&](std::size_t a, std::size_t b) {
    return adapter_key(groups[a].adapter) < adapter_key(groups[b].adapter);
  });
  layout.row_begin.resize(groups.size());
  for (const auto& group : groups) {
    layout.num_rows += static_cast<std::int64_t>(group.tokens.size());
    layout.num_sampled += group.sampled;
  }
  require<Error>(layout.num_rows <= limits_.max_rows, "forward: ", layout.num_rows, " rows, wanted at most ",
                 limits_.max_rows);
  require<Error>(layout.num_sampled <= limits_.max_sampled_rows, "forward: ", layout.num_sampled,
                 " sampled rows, wanted at most ", limits_.max_sampled_rows);
  std::vector<Segment> segments;
  std::vector<std::int32_t> tokens, positions;
  spans_.clear();
  std::int64_t row = 0, segment_begin = 0;
  for (std::size_t i = 0; i < layout.order.size(); ++i) {
    const auto& group = groups[layout.order[i]];
    layout.row_begin[layout.order[i]] = row;
    const std::int64_t end = row + static_cast<std::int64_t>(group.tokens.size());
    tokens.insert(tokens.end(), group.tokens.begin(), group.tokens.end());
    for (std::int64_t i = row; i < end; ++i) positions.push_back(static_cast<std::int32_t>(group.position + i - row));
    spans_.push_back({row, end, group.position, group.block_table});
    row = end;
    // Rows of one adapter are one segment, but every sequence drops elements of its own.
    const auto dropping = [](const RowGroup& g) {
      return g.train != nullptr && g.train->dropout.p > 0.0 ? g.train : nullptr;
    };
    const RowGroup* next = i + 1 == layout.order.size() ? nullptr : &groups[layout.order[i + 1]];
    if (next == nullptr || next->adapter != group.adapter || dropping(group) != nullptr || dropping(*next) != nullptr) {
      if (group.adapter != nullptr)
        segments.push_back({group.adapter, segment_begin, row, dropping(group), group.position});
      segment_begin = row;
    }
  }
  list_windows(layout);
  layout.fixed = fix(layout, segments, tokens, positions);
  if (!layout.fixed) {
    forward_.clear_segments();
    for (const auto& s : segments) add_segment(forward_, s, nullptr);
    for (std::size_t g = 0; g < groups.size(); ++g)
      forward_.add_virtual_rows(groups[g].adapter, groups[g].position, layout.row_begin[g], layout.row_end(g), nullptr);
  }
  // Virtual tokens have no embedding of their own; that of the first token is replaced, or of no use.
  for (auto& token : tokens) token = std::max(token, 0);
  forward_.batch.token_ids = forward_.staged(IndexArray::kTokens, DType::kInt32, tokens);
  forward_.batch.positions = forward_.staged(IndexArray::kPositions, DType::kInt32, positions);
  forward_.batch.spans = spans_;
  return layout;
}

void Executor::add_segment(Lane& lane, const Segment& segment, float* gradients) {
  const SegmentDropout dropout =
      segment.dropout == nullptr ? SegmentDropout{} : SegmentDropout{segment.dropout->dropout, segment.position};
  lane.add_segments(*segment.adapter, segment.begin, segment.end, gradients,
                    segment.dropout == nullptr ? nullptr : &dropout);
}

// Windows by program, in memory that is never moved: recordings read it.
void Executor::list_windows(const Layout& layout) {
  for (auto& [program, windows] : windows_) windows.device.clear(), windows.host.clear();
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const auto& group = layout.groups[g];
    if (group.train == nullptr) continue;
    Windows& windows = windows_[group.train->program];
    const auto& store = group.train->store();
    for (const auto& [spans, to] : {std::pair(&windows.device, store.device), std::pair(&windows.host, store.host)}) {
      spans->reserve(static_cast<std::size_t>(limits_.max_rows));
      spans->push_back({layout.row_begin[g], layout.row_end(g), to, group.train->length(), group.position});
    }
  }
}

// A batch that the device may have recorded gets one of few sizes: rows behind its own belong to no sequence and no
// adapter, spans and segments behind its own have no rows.
bool Executor::fix(Layout& layout, std::span<const Segment> segments, std::vector<std::int32_t>& tokens,
                   std::vector<std::int32_t>& positions) {
  const std::int64_t rows = layout.num_rows, fixed = std::min(round_rows(rows), limits_.max_rows);
  const auto in_use = [](const auto& entry) { return !entry.second.device.empty(); };
  const auto num_programs = std::count_if(windows_.begin(), windows_.end(), in_use);
  const auto windows = std::find_if(windows_.begin(), windows_.end(), in_use);
  const auto plain = [](const Segment& segment) { return segment.adapter->plain_lora() && segment.dropout == nullptr; };
  if (!record_ || rows == 0 || !std::all_of(segments.begin(), segments.end(), plain) ||
      spans_.size() > kMostFixedSpans || segments.size() > Lane::kMostFixedSegments || num_programs > 1 ||
      (num_programs == 1 && windows->second.device.size() > kMostFixedWindows))
    return false;
  layout.num_rows = fixed;
  tokens.resize(static_cast<std::size_t>(fixed)), positions.resize(static_cast<std::size_t>(fixed));
  spans_.resize(std::bit_ceil(spans_.size()), {rows, rows, 0, nullptr});
  layout.key = {.rows = fixed, .spans = spans_.size()};
  if (!segments.empty()) layout.key.adapters = std::bit_ceil(segments.size());
  if (num_programs == 1) {
    const std::size_t count = std::bit_ceil(windows->second.device.size());
    windows->second.device.resize(count), windows->second.host.resize(count);
    layout.key.windows = count, layout.key.program = windows->first;
  }
  forward_.begin_fixed_segments(layout.key.adapters, fixed);
  for (std::size_t i = 0; i < segments.size(); ++i)
    forward_.set_fixed_segments(i, *segments[i].adapter, segments[i].begin, segments[i].end);
  return true;
}

TensorView Executor::forward(std::span<const RowGroup> groups) {
  outcomes_.clear();
  const Arena::Scope scope(*forward_.context().scratch);
  const BatchIdentity batch(forward_.context(), ++num_batches_);
  const Layout layout = lay_out(groups);
  if (layout.num_rows == 0) return {};
  const RowCounts rows = {layout.num_rows, 0, 0};
  const auto trunk = [&] {
    Savers savers;
    for (const auto& [program, windows] : windows_)
      if (!windows.device.empty()) savers.add(Saver(forward_.context(), *program, windows.device, windows.host));
    model_.trunk().run(state(forward_), rows, forward_.workspace(), {}, savers.empty() ? nullptr : &savers);
  };
  layout.fixed ? run_recorded(layout.key, trunk) : trunk();
  const TensorView hidden = model_.trunk().value(model_.hidden(), rows, forward_.workspace(), {});
  run_loss(layout, hidden);
  run_score(layout, hidden);
  return run_sample(layout, hidden);
}

// The first batch of a size runs as it is, which warms up what must not be recorded, and spares rare sizes. A size that
// keeps outgrowing what was recorded is not worth recording.
void Executor::run_recorded(const RecordedKey& key, const std::function<void()>& work) {
  constexpr int kMostAttempts = 12;
  Recorded& entry = recorded_[key];
  entry.used = num_batches_;
  const bool replayed = entry.work != nullptr && entry.work->replay();
  if (!replayed) {
    if (!std::exchange(entry.seen, true) || entry.attempts == kMostAttempts) {
      entry.work.reset();
      work();
      return;
    }
    ++entry.attempts;
    entry.work = device_.record(forward_.context(), ledger_, work, entry.work.get());
    if (entry.work == nullptr) return work();
    ++num_recorded_;
    require<DeviceError>(entry.work->replay(), "forward: a batch does not fit what was recorded of it");
    forget_old_recordings();
  }
  ++num_replayed_;
}

// Those that were used longest ago, until the others are few and small enough; never the last one.
void Executor::forget_old_recordings() {
  constexpr std::size_t kMostRecordings = 64;
  while (true) {
    std::size_t count = 0, bytes = 0;
    auto oldest = recorded_.end();
    for (auto i = recorded_.begin(); i != recorded_.end(); ++i) {
      if (i->second.work == nullptr) continue;
      ++count, bytes += i->second.work->bytes();
      if (oldest == recorded_.end() || i->second.used < oldest->second.used) oldest = i;
    }
    if (count <= 1 || (count <= kMostRecordings && bytes <= kMostRecordedBytes)) return;
    recorded_.erase(oldest);
  }
}

TensorView Executor::run_sample(const Layout& layout, const TensorView& hidden) {
  if (layout.num_sampled == 0) return {};
  std::vector<std::int32_t> sampled;
  for (std::size_t g = 0; g < layout.groups.size(); ++g)
    for (std::int64_t i = layout.groups[g].sampled; i > 0; --i)
      sampled.push_back(static_cast<std::int32_t>(layout.row_end(g) - i));
  forward_.begin_output_rows();
  std::int64_t row = 0;
  for (const auto& group : layout.groups) {
    const std::int64_t begin = std::exchange(row, row + group.sampled);
    if (group.adapter != nullptr) forward_.add_output_rows(*group.adapter, begin, row, nullptr, nullptr);
  }
  forward_.batch.sampled_rows = forward_.staged(IndexArray::kRows, DType::kInt32, sampled);
  const RowCounts rows = {layout.num_rows, layout.num_sampled, 0};
  model_.sample_head().run(state(forward_), rows, head_workspace(), {&hidden, 1});
  return model_.sample_head().value(model_.logits(), rows, head_workspace(), {&hidden, 1});
}

std::byte* Executor::head_workspace() const { return forward_.workspace() + model_.trunk().workspace_bytes(); }

void Executor::run_loss(const Layout& layout, const TensorView& hidden) {
  // offsets: where each window's rows with a target are in the window; the scatter's index.
  std::vector<std::int32_t> rows, labels, offsets;
  std::vector<float> scale;
  std::vector<std::pair<std::size_t, std::int64_t>> windows;  // group, targets
  const TrainingProgram* program = nullptr;
  forward_.begin_output_rows();
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const auto& group = layout.groups[g];
    if (group.train == nullptr) continue;
    program = group.train->program;
    const auto first = static_cast<std::int64_t>(offsets.size());
    const auto& all = group.train->labels;
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
    add_output_targets(*group.train, group.position, std::span(offsets).subspan(static_cast<std::size_t>(first)),
                       first);
  }
  if (windows.empty()) return;
  const auto total = static_cast<std::int64_t>(offsets.size());
  const RowCounts counts = {layout.num_rows, 0, total};
  TensorView grads, index;
  if (total > 0) {
    forward_.batch.target_rows = forward_.staged(IndexArray::kRows, DType::kInt32, rows);
    forward_.batch.labels = forward_.staged(IndexArray::kLabels, DType::kInt32, labels);
    forward_.batch.grad_scale = forward_.staged(IndexArray::kScale, DType::kFloat32, scale);
    index = forward_.staged(IndexArray::kOffsets, DType::kInt32, offsets);
    forward_.batch.loss = forward_.index_array(IndexArray::kLoss, DType::kFloat32, total);
    program->loss_head.run(state(forward_), counts, head_workspace(), {&hidden, 1});
    grads = program->loss_head.value(program->target_grad, counts, head_workspace(), {&hidden, 1});
    fetch_losses(0, total);
  }
  std::int64_t begin = 0;
  for (const auto& [g, count] : windows) {
    const auto& group = layout.groups[g];
    const std::int64_t end = group.position + static_cast<std::int64_t>(group.tokens.size());
    const TensorView store = group.train->grad_hidden(group.position, end);
    run(forward_.context(), ZeroArgs{store});
    if (count == 0) continue;
    run(forward_.context(), ScatterRowsArgs{grads.rows(begin, begin + count), index.rows(begin, begin + count), store});
    outcomes_.push_back({group.train, nullptr, begin, begin + count});
    begin += count;
  }
}

// A row's gradient is added once: those of a forward that was restarted are there already. Dropout goes by position,
// and rows without a target lie between.
void Executor::add_output_targets(TrainState& train, std::int64_t position, std::span<const std::int32_t> offsets,
                                  std::int64_t first_row) {
  const auto at = [&](std::size_t i) { return position + offsets[i]; };
  const bool drops = train.dropout.p > 0.0;
  for (std::size_t begin = 0, end = 0; begin < offsets.size(); begin = end) {
    const bool added = at(begin) < train.output_gradients_end;
    for (end = begin + 1; end < offsets.size(); ++end)
      if ((at(end) < train.output_gradients_end) != added || (drops && at(end) != at(end - 1) + 1)) break;
    const SegmentDropout dropout{train.dropout, at(begin)};
    forward_.add_output_rows(*train.adapter, first_row + static_cast<std::int64_t>(begin),
                             first_row + static_cast<std::int64_t>(end), added ? nullptr : train.gradients,
                             drops ? &dropout : nullptr);
  }
  if (!offsets.empty()) train.output_gradients_end = std::max(train.output_gradients_end, at(offsets.size() - 1) + 1);
}

void Executor::run_score(const Layout& layout, const TensorView& hidden) {
  std::vector<std::int32_t> rows, labels;
  forward_.begin_output_rows();
  for (std::size_t g = 0; g < layout.groups.size(); ++g) {
    const auto first = static_cast<std::int64_t>(rows.size());
    for (std::size_t i = 0; i < layout.groups[g].score_labels.size(); ++i) {
      rows.push_back(
          static_cast<std::int32_t>(layout.row_begin[g] + layout.groups[g].score_from + static_cast<std::int64_t>(i)));
      labels.push_back(layout.groups[g].score_labels[i]);
    }
    if (layout.groups[g].adapter != nullptr)
      forward_.add_output_rows(*layout.groups[g].adapter, first, static_cast<std::int64_t>(rows.size()), nullptr,
                               nullptr);
  }
  if (rows.empty()) return;
  const auto total = static_cast<std::int64_t>(rows.size());
  forward_.batch.target_rows = forward_.staged(IndexArray::kRows, DType::kInt32, rows);
  forward_.batch.labels = forward_.staged(IndexArray::kLabels, DType::kInt32, labels);
  forward_.batch.grad_scale = {};
  forward_.batch.loss = forward_.index_array(IndexArray::kLoss, DType::kFloat32, total);
  model_.score_head().run(state(forward_), {layout.num_rows, 0, total}, head_workspace(), {&hidden, 1});
  std::int64_t begin = outcomes_.empty() ? 0 : outcomes_.back().end;  // behind the losses
  fetch_losses(begin, total);
  for (const auto& group : layout.groups) {
    const std::int64_t end = begin + static_cast<std::int64_t>(group.score_labels.size());
    if (end > begin) outcomes_.push_back({nullptr, group.score, begin, end});
    begin = end;
  }
}

void Executor::fetch_losses(std::int64_t begin, std::int64_t count) {
  run(forward_.context(), FetchArgs{losses_.data() + static_cast<std::size_t>(begin) * sizeof(float),
                                    forward_.batch.loss.data(), static_cast<std::size_t>(count) * sizeof(float)});
}

void Executor::finish_forward() {
  device_.synchronize(forward_.context().stream);
  const auto* losses = reinterpret_cast<const float*>(losses_.data());
  for (const auto& outcome : outcomes_) {
    if (outcome.train != nullptr)
      outcome.train->loss_sum += std::accumulate(losses + outcome.begin, losses + outcome.end, 0.0);
    else
      std::transform(losses + outcome.begin, losses + outcome.end, outcome.score, std::negate<>());
  }
  outcomes_.clear();
}

}  // namespace flexcore
