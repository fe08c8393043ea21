#include "ops/sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "backends/cpu/families.h"
#include "backends/cpu/scratch.h"
#include "backends/cpu/token_draw.h"

namespace flexcore::cpu {

namespace {

// Below this the softmax is a step at the maximum: greedy, as vLLM does.
constexpr float kGreedyTemperature = 1e-5f;

bool changes_logits(const SamplingRow& row) {
  return !row.logit_bias.empty() || !row.forbidden.empty() || row.presence_penalty != 0 || row.frequency_penalty != 0 ||
         row.repetition_penalty != 1.0f;
}
bool is_greedy(const SamplingRow& row) { return row.temperature < kGreedyTemperature; }
bool needs_scratch(const SamplingRow& row) { return changes_logits(row) || !is_greedy(row) || row.num_logprobs > 0; }

bool sound(const RowPeak& peak) { return peak.sum > 0 && std::isfinite(peak.sum); }

DrawScratch make_scratch(OpContext& context, std::int64_t vocab_size) {
  Arena& arena = *context.scratch;
  DrawScratch scratch{arena.allocate<float>(vocab_size),        arena.allocate<float>(vocab_size),
                      arena.allocate<float>(vocab_size),        arena.allocate<std::int32_t>(vocab_size),
                      arena.allocate<std::int32_t>(vocab_size), arena.allocate<std::int32_t>(vocab_size)};
  std::fill_n(scratch.counts, vocab_size, 0);
  return scratch;
}

/// Raw logits are left as they are: log-probabilities are theirs.
std::int32_t choose(std::int64_t index, const SamplingRow& row, std::span<const float> raw, RowPeak peak,
                    DrawScratch* scratch) {
  std::span<const float> logits = raw;
  if (changes_logits(row)) {
    std::copy(raw.begin(), raw.end(), scratch->logits);
    adjust_logits(row, *scratch);
    logits = {scratch->logits, raw.size()};
    peak = softmax_kernels().peak(logits.data(), static_cast<std::int64_t>(logits.size()));
    require<Error>(sound(peak), SampleArgs::kName, ": row ", index, " has no token left to choose from");
  }
  return is_greedy(row) ? peak.argmax : draw_token(row, logits, peak, *scratch);
}

void sample(OpContext& context, const SampleArgs& args) {
  const std::int64_t num_rows = args.logits.shape(0), vocab_size = args.logits.shape(1);
  if (num_rows == 0) return;
  const Arena::Scope scope(*context.scratch);

  // All rows are read and judged before any result is written, so that a bad row can be taken out and the call
  // repeated.
  auto* peaks = context.scratch->allocate<RowPeak>(num_rows);
  context.threads->parallel_for_each(num_rows, [&](std::int64_t i, int) {
    peaks[i] = softmax_kernels().peak(args.logits.row<const float>(i), vocab_size);
  });
  for (std::int64_t i = 0; i < num_rows; ++i)
    require<Error>(sound(peaks[i]), SampleArgs::kName, ": row ", i,
                   " of the logits has NaN, +infinity or nothing but -infinity");

  auto* tokens = context.scratch->allocate<std::int32_t>(num_rows);
  DrawScratch* scratch = nullptr;
  if (std::any_of(args.rows.begin(), args.rows.end(), needs_scratch)) {
    const int workers = context.threads->size();
    scratch = context.scratch->allocate<DrawScratch>(workers);
    for (int i = 0; i < workers; ++i) scratch[i] = make_scratch(context, vocab_size);
  }
  const auto raw_row = [&](std::int64_t i) {
    return std::span(args.logits.row<const float>(i), static_cast<std::size_t>(vocab_size));
  };
  const auto log_sum_exp = [&](std::int64_t i) { return static_cast<double>(peaks[i].max) + std::log(peaks[i].sum); };
  if (scratch == nullptr) {
    for (std::int64_t i = 0; i < num_rows; ++i) tokens[i] = peaks[i].argmax;
  } else {
    context.threads->parallel_for_each(num_rows, [&](std::int64_t i, int worker) {
      const SamplingRow& row = args.rows[i];
      tokens[i] = choose(i, row, raw_row(i), peaks[i], &scratch[worker]);
      if (row.num_logprobs > 0)
        top_log_probabilities(raw_row(i), log_sum_exp(i),
                              args.results[i].top.first(static_cast<std::size_t>(row.num_logprobs)), scratch[worker]);
    });
  }
  for (std::int64_t i = 0; i < num_rows; ++i) {
    args.results[i].token = tokens[i];
    args.results[i].logprob = static_cast<float>(static_cast<double>(raw_row(i)[tokens[i]]) - log_sum_exp(i));
  }
}

}  // namespace

std::int64_t sampling_scratch(const ScratchShape& s) {
  constexpr std::int64_t kArrays = 6;  // of DrawScratch
  const std::int64_t worker = kArrays * (s.vocab_size * 4 + 64) + static_cast<std::int64_t>(sizeof(DrawScratch));
  return s.num_threads * worker + s.sampled_rows * (static_cast<std::int64_t>(sizeof(RowPeak)) + 4) + 1024;
}

void register_sampling(OpRegistry& registry) { registry.add<SampleArgs>(DeviceKind::kCpu, sample); }

}  // namespace flexcore::cpu
