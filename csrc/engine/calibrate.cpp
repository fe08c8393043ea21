#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/impl.h"
#include "engine/step_time_file.h"

namespace flexcore {

namespace {

constexpr double kBudgetMs = 1200.0;  // of all probes; large models get fewer of them
constexpr std::int64_t kProbeContext = 128;
constexpr double kStillHolds = 0.4;          // of a probe's time: beyond it, kept coefficients are of another machine
constexpr std::int64_t kWorthKeeping = 200;  // steps

}  // namespace

// Probe steps with made-up tokens fit the step-time model; what runs later corrects it. Where an earlier engine left
// its coefficients, a few probes see whether they still hold.
void Engine::Impl::calibrate() {
  const std::int64_t context_tokens = std::min(kProbeContext, sizes.max_model_len - 1);
  const std::int64_t capacity = std::min(sizes.limits.max_rows, sizes.max_model_len);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(capacity));
  for (std::size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<std::int32_t>((i * 7919) % static_cast<std::size_t>(model.vocab_size));

  std::vector<CostModel::Sample> samples;
  const double begin = now_ms();
  const auto out_of_time = [&] { return now_ms() - begin > kBudgetMs; };
  const auto timed = [&](const StepFeatures& features, auto&& work) {
    const double start_ms = now_ms();
    work();
    executor->finish_forward();
    executor->finish_backward();
    samples.push_back({features, now_ms() - start_ms});
  };

  const auto decode = [&](std::int64_t rows) {
    std::vector<std::vector<std::int32_t>> tables(static_cast<std::size_t>(rows));
    std::vector<RowGroup> groups;
    bool fits = true;
    for (auto& table : tables) {
      fits = fits && blocks.reserve(table, context_tokens + 1);
      groups.push_back({.tokens = std::span(tokens).first(1),
                        .position = context_tokens,
                        .block_table = table.data(),
                        .sampled = 1});
    }
    if (fits)
      timed({.decode_rows = rows, .decode_context = rows * (context_tokens + 1), .sampled_rows = rows},
            [&] { executor->forward(groups); });
    for (auto& table : tables) blocks.release(table);
  };
  const auto prefill = [&](std::int64_t rows) {
    std::vector<std::int32_t> table;
    if (!blocks.reserve(table, rows)) return;
    const RowGroup group{
        .tokens = std::span(tokens).first(static_cast<std::size_t>(rows)), .block_table = table.data(), .sampled = 1};
    timed({.prefill_tokens = rows, .prefill_context = rows * (rows + 1) / 2, .sampled_rows = 1},
          [&] { executor->forward({&group, 1}); });
    blocks.release(table);
  };
  const auto finetune = [&](std::int64_t rows) {
    const std::string name = "\x01probe";
    const auto adapter = adapters.create(name, LoraConfig{.r = 8, .lora_alpha = 8.0}, 0);
    TrainingProgram& program = compiled.training(adapter->layout.bypasses());
    executor->reserve(program);
    Buffer gradients(device->allocator(), ledger, MemoryTag::kGradients, adapter->bytes());
    Example example;
    example.input_ids.assign(tokens.begin(), tokens.begin() + rows);
    example.labels = example.input_ids;
    TrainState state(example, adapter, program, reinterpret_cast<float*>(gradients.data()), 1.0f);
    std::vector<std::int32_t> table;
    std::vector<BlockMove> moves;  // nobody is there
    state.block_table = &table;
    BlockRun store = scheduler.reserve_run(store_blocks(model, sizes, program, rows).device, moves);
    if (store && blocks.reserve(table, rows)) {
      state.place({.device = executor->block(store)}, ledger, executor->shape());
      const RowGroup group{
          .tokens = example.input_ids, .block_table = table.data(), .adapter = adapter.get(), .train = &state};
      timed({.finetune_tokens = rows, .finetune_context = rows * (rows + 1) / 2},
            [&] { executor->forward({&group, 1}); });
      const BackwardRows unit{&state, 0, rows};
      const std::int64_t units = std::min<std::int64_t>(model.num_layers, 4);
      for (std::int64_t layer = model.num_layers;
           layer-- > std::max(program.first_layer, static_cast<int>(model.num_layers - units));)
        timed({.backward_layer_tokens = rows, .backward_layer_context = rows * (rows + 1) / 2, .backward_units = 1},
              [&] { executor->backward(static_cast<int>(layer), {&unit, 1}); });
      blocks.release(table);
    }
    blocks.release_run(store);
    adapters.remove(name);
  };

  const std::int64_t many = std::min<std::int64_t>(sizes.limits.max_sampled_rows, 8);
  const std::int64_t large = std::min<std::int64_t>(capacity, 192), small = std::max<std::int64_t>(large / 4, 1);
  decode(1);
  samples.clear();  // first touch of weights and workspace
  decode(1);
  if (!out_of_time()) prefill(small);
  if (!out_of_time()) finetune(small);
  const auto forget_peaks = [&] {
    for (std::size_t i = 0; i < static_cast<std::size_t>(MemoryTag::kCount); ++i)
      ledger.reset_peak(static_cast<MemoryTag>(i));
  };
  const StepTimeFile file(model, config, device->name(), threads.size());
  if (const auto known = file.load()) {
    cost.restore(*known);
    // Most of them: the first ones also touch memory for the first time.
    const auto near = std::count_if(samples.begin(), samples.end(), [&](const CostModel::Sample& sample) {
      return std::abs(sample.measured_ms / cost.predict_ms(sample.features) - 1.0) < kStillHolds;
    });
    if (2 * near > static_cast<std::ptrdiff_t>(samples.size())) {
      for (const auto& sample : samples) cost.observe(sample.features, sample.measured_ms);
      forget_peaks();
      return;
    }
  }
  if (!out_of_time()) decode(many);
  if (!out_of_time()) prefill(large);
  if (!out_of_time()) finetune(large);
  if (!out_of_time()) decode(1);
  if (!out_of_time()) decode(many);
  cost.fit(samples);
  file.save(cost.coefficients());
  forget_peaks();
}

// What serving has taught goes to the next engine.
void Engine::Impl::keep_step_times() const {
  if (cost.num_observed() >= kWorthKeeping)
    StepTimeFile(model, config, device->name(), threads.size()).save(cost.coefficients());
}

}  // namespace flexcore
