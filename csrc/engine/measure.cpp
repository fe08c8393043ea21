#include <algorithm>
#include <utility>

#include "core/check.h"
#include "engine/impl.h"
#include "ops/scatter.h"

namespace flexcore {

namespace {

// Pages for work outside the scheduler; given back on every way out.
class TemporaryPages {
 public:
  TemporaryPages(BlockManager& blocks, std::vector<std::int32_t>& table, std::int64_t tokens)
      : blocks_(blocks), table_(table) {
    require<OutOfMemory>(blocks_.reserve(table_, tokens), "kv pages: ", tokens, " tokens do not fit, ",
                         blocks_.num_free(), " of ", blocks_.num_blocks(), " pages are free");
  }
  ~TemporaryPages() { blocks_.release(table_); }
  TemporaryPages(const TemporaryPages&) = delete;
  TemporaryPages& operator=(const TemporaryPages&) = delete;

 private:
  BlockManager& blocks_;
  std::vector<std::int32_t>& table_;
};

/// Of a training sequence, with what it keeps.
class TemporaryRun {
 public:
  TemporaryRun(Scheduler& scheduler, BlockManager& blocks, Executor& executor, std::int64_t count, Tier tier)
      : blocks_(blocks) {
    if (count == 0) return;
    std::vector<BlockMove> moves;
    run_ = scheduler.reserve_run(count, moves, tier);
    executor.move_blocks(moves);
    if (run_) return;
    const bool device = tier == Tier::kDevice;
    throw OutOfMemory(str(device ? "kv pages: " : "swap space: ", count,
                          " pages next to each other were wanted for a backward, ",
                          device ? blocks_.num_free() : blocks_.num_free_host(), " of ",
                          device ? blocks_.num_blocks() : blocks_.num_host_blocks(), " are free; raise ",
                          device ? "kv_cache_memory_bytes" : "swap_space_bytes"));
  }
  ~TemporaryRun() { blocks_.release_run(run_); }
  TemporaryRun(const TemporaryRun&) = delete;
  TemporaryRun& operator=(const TemporaryRun&) = delete;
  const BlockRun& run() const { return run_; }

 private:
  BlockManager& blocks_;
  BlockRun run_;
};

/// Pages are given back when nothing uses them any more, whatever happened.
class AbandonAtEnd {
 public:
  explicit AbandonAtEnd(Executor& executor) : executor_(executor) {}
  ~AbandonAtEnd() {
    try {
      executor_.abandon();
    } catch (const Error&) {  // a device that is lost uses nothing
    }
  }
  AbandonAtEnd(const AbandonAtEnd&) = delete;
  AbandonAtEnd& operator=(const AbandonAtEnd&) = delete;

 private:
  Executor& executor_;
};

}  // namespace

void Engine::Impl::forward_alone(std::span<const std::int32_t> token_ids, const Adapter* adapter, float* scores,
                                 float* logits) {
  check_tokens(token_ids, "token_ids");
  const std::int64_t ahead = adapter == nullptr ? 0 : adapter->layout.num_virtual_tokens;
  std::vector<std::int32_t> all;
  with_virtual_tokens(token_ids, ahead, all);
  const std::span<const std::int32_t> tokens(all);
  const auto length = static_cast<std::int64_t>(tokens.size());
  require(length <= sizes.max_model_len, "token_ids: ", token_ids.size(), " tokens, wanted at most max_model_len (",
          sizes.max_model_len, ")", ahead > 0 ? str(" less ", ahead, " virtual tokens") : "");
  std::vector<std::int32_t> table;
  const TemporaryPages pages(blocks, table, length);
  const AbandonAtEnd end(*executor);
  const std::int64_t chunk = logits != nullptr ? sizes.limits.max_sampled_rows : sizes.limits.max_rows;
  for (std::int64_t begin = 0; begin < length; begin += chunk) {
    const std::int64_t end = std::min(length, begin + chunk);
    const auto part = [&](std::int64_t from, std::int64_t to) {
      return tokens.subspan(static_cast<std::size_t>(from), static_cast<std::size_t>(to - from));
    };
    RowGroup group{.tokens = part(begin, end), .position = begin, .block_table = table.data(), .adapter = adapter};
    const std::int64_t first = std::max(begin, std::min(ahead, end));  // of the rows that are no virtual tokens
    if (scores != nullptr) {
      group.score_from = first - begin;
      if (first < end) group.score_labels = part(first + 1, std::min(length, end + 1));
      group.score = scores + (first - ahead);
    } else {
      group.sampled = end - first;
    }
    const TensorView rows = executor->forward({&group, 1});
    executor->finish_forward();
    if (logits != nullptr && first < end)
      device->allocator().download(logits + (first - ahead) * model.vocab_size, rows.data(), rows.bytes());
  }
}

LossAndGradients Engine::Impl::loss_and_gradients(const std::string& name, const std::vector<Example>& examples,
                                                  std::int64_t window_tokens, std::int64_t backward_window_tokens,
                                                  std::optional<std::uint64_t> dropout_seed) {
  const auto adapter = adapters.get(name);
  require(window_tokens >= 0, "window_tokens: ", window_tokens, ", wanted >= 0");
  require(backward_window_tokens >= 0, "backward_window_tokens: ", backward_window_tokens, ", wanted >= 0");
  validate(examples, adapter->layout);
  std::size_t longest = 0;
  for (const auto& example : examples) longest = std::max(longest, example.input_ids.size());
  longest += static_cast<std::size_t>(adapter->layout.num_virtual_tokens);
  EngineSizes here = sizes;  // of host memory, what jobs leave to all of the examples
  here.limits.num_host_blocks = blocks.num_free_host() / static_cast<std::int64_t>(examples.size());
  TrainingProgram& program = fitting_program(model, config, here, compiled, adapter->layout.bypasses(),
                                             static_cast<std::int64_t>(longest), "examples");
  executor->reserve(program);
  Buffer gradients(device->allocator(), ledger, MemoryTag::kGradients,
                   static_cast<std::size_t>(adapter->layout.num_parameters) * sizeof(float));
  auto* grads = reinterpret_cast<float*>(gradients.data());
  run(context, ZeroArgs{gradients.view(DType::kFloat32, {adapter->layout.num_parameters})});

  std::int64_t targets = 0;
  for (const auto& example : examples) targets += count_targets(example, adapter->layout);
  struct Progress {
    std::vector<std::int32_t> block_table;
    std::int64_t forward_done = 0, rows_left = 0;
    std::unique_ptr<TemporaryPages> pages;
    std::unique_ptr<TemporaryRun> store, host_store;
    std::unique_ptr<TrainState> state;
  };
  std::vector<std::unique_ptr<Progress>> sequences;
  for (const auto& example : examples) {
    auto& sequence = *sequences.emplace_back(std::make_unique<Progress>());
    sequence.state = std::make_unique<TrainState>(example, adapter, program, grads, 1.0f / static_cast<float>(targets));
    if (dropout_seed)
      sequence.state->dropout = {adapter->dropout(), *dropout_seed,
                                 static_cast<std::uint32_t>(&example - examples.data())};
    const StoreBlocks store = store_blocks(model, sizes, program, sequence.state->length());
    sequence.store = std::make_unique<TemporaryRun>(scheduler, blocks, *executor, store.device, Tier::kDevice);
    sequence.host_store = std::make_unique<TemporaryRun>(scheduler, blocks, *executor, store.host, Tier::kHost);
    sequence.state->place({executor->block(sequence.store->run()), executor->block(sequence.host_store->run())}, ledger,
                          executor->shape());
    sequence.state->block_table = &sequence.block_table;
  }
  // Keys and values go where no store is, and are not moved any more.
  for (auto& sequence : sequences)
    sequence->pages = std::make_unique<TemporaryPages>(blocks, sequence->block_table, sequence->state->length());
  const AbandonAtEnd end(*executor);
  // All sequences advance together, as many rows a pass as fit.
  const std::int64_t max_rows = sizes.limits.max_rows;
  const auto window_of = [max_rows](std::int64_t wanted) { return wanted > 0 ? std::min(wanted, max_rows) : max_rows; };
  const std::int64_t forward_window = window_of(window_tokens), backward_window = window_of(backward_window_tokens);
  for (bool more = true; more;) {
    more = false;
    std::vector<RowGroup> groups;
    std::int64_t rows = 0;
    for (auto& sequence : sequences) {
      TrainState* state = sequence->state.get();
      auto& done = sequence->forward_done;
      const std::int64_t count = std::min({state->length() - done, forward_window, max_rows - rows});
      if (done == state->length()) continue;
      more = true;
      if (count == 0) break;
      const std::span<const std::int32_t> tokens(state->tokens);
      groups.push_back({.tokens = tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count)),
                        .position = done,
                        .block_table = sequence->block_table.data(),
                        .adapter = adapter.get(),
                        .train = state});
      done += count;
      rows += count;
    }
    if (groups.empty()) continue;
    executor->forward(groups);
    executor->finish_forward();
  }
  for (std::int64_t layer = model.num_layers; layer-- > program.first_layer;) {
    for (auto& sequence : sequences) sequence->rows_left = sequence->state->length();
    for (bool more = true; more;) {
      more = false;
      std::vector<BackwardRows> unit;
      std::int64_t rows = 0;
      for (auto& sequence : sequences) {
        TrainState* state = sequence->state.get();
        auto& left = sequence->rows_left;
        const std::int64_t count = std::min({left, backward_window, max_rows - rows});
        if (left == 0) continue;
        more = true;
        if (count == 0) break;
        unit.push_back({state, left - count, left});
        left -= count;
        rows += count;
      }
      if (!unit.empty()) executor->backward(static_cast<int>(layer), unit);
    }
  }
  executor->finish_backward();
  LossAndGradients result;
  for (const auto& sequence : sequences) result.loss += sequence->state->loss_sum;
  result.loss /= static_cast<double>(targets);
  std::vector<float> host(static_cast<std::size_t>(adapter->layout.num_parameters));
  device->allocator().download(host.data(), grads, gradients.bytes());
  for (auto& [array, values] : adapter_tensors(*adapter, host.data()))
    result.gradients.push_back({peft_key(array), array.shape, std::move(values)});
  return result;
}

}  // namespace flexcore
