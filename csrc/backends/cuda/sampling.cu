#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "backends/cuda/families.h"
#include "backends/cuda/kernels/elementwise.cuh"
#include "backends/cuda/kernels/sampling.cuh"
#include "backends/cuda/scratch.h"
#include "backends/cuda/views.h"
#include "core/number.h"
#include "ops/sampling.h"

namespace flexcore::cuda {

namespace {

// Below this the softmax is a step at the maximum: greedy, as vLLM does.
constexpr float kGreedyTemperature = 1e-5f;
// Least columns of a part, when one row is shared by several blocks.
constexpr std::int64_t kLeastPart = 4096;
constexpr std::size_t kPeakSharedBytes = kWarpSize * (sizeof(RowPeak) + sizeof(double));

bool penalised(const SamplingRow& row) {
  return row.presence_penalty != 0 || row.frequency_penalty != 0 || row.repetition_penalty != 1.0f;
}
bool changes_logits(const SamplingRow& row) {
  return !row.logit_bias.empty() || !row.forbidden.empty() || penalised(row);
}
bool is_greedy(const SamplingRow& row) { return row.temperature < kGreedyTemperature; }
bool is_filtered(const SamplingRow& row, std::int64_t vocab_size) {
  return !is_greedy(row) && ((row.top_k > 0 && row.top_k < vocab_size) || row.top_p < 1);
}

/// Rows [begin, end) whose scratch is used together.
struct Group {
  std::int64_t begin = 0, end = 0;
  std::int64_t adjusted = 0, integers = 0, sort_keys = 0;  // rows, rows, keys
  std::int64_t adjusted_index = 0;                         // in the table: logits' row of each adjusted one
};

/// What the kernels read beside the logits, as one piece of bytes, and how the work is cut.
struct Table {
  std::vector<SampleRow> rows;
  std::vector<std::byte> bytes;  // the rows, then all lists
  std::vector<Group> groups;
  std::int64_t num_top = 0;  // wanted log-probabilities of all rows

  template <class T>
  std::int64_t append(std::span<const T> list) {
    const std::size_t at = (bytes.size() + 15) / 16 * 16;
    bytes.resize(at + list.size_bytes());
    if (!list.empty()) std::memcpy(bytes.data() + at, list.data(), list.size_bytes());
    return static_cast<std::int64_t>(at);
  }
};

std::vector<TokenLogprob> sorted_bias(const SamplingRow& row) {
  std::vector<TokenLogprob> bias;
  for (const auto& [token, value] : row.logit_bias) bias.push_back({token, value});
  std::stable_sort(bias.begin(), bias.end(), [](const auto& a, const auto& b) { return a.token < b.token; });
  return bias;
}

/// Rows that need scratch, 4 or 8 bytes a token, are cut into groups of `most_working`.
Table build_table(const SampleArgs& args, int most_working) {
  const std::int64_t vocab_size = args.logits.shape(1);
  Table table;
  table.bytes.resize(args.rows.size() * sizeof(SampleRow));
  std::vector<std::int32_t> adjusted_rows;
  Group group;
  int working = 0;
  const auto close_group = [&] {
    group.adjusted_index = table.append(std::span<const std::int32_t>(adjusted_rows));
    table.groups.push_back(group);
    group = {.begin = group.end, .end = group.end};
    adjusted_rows.clear();
    working = 0;
  };
  for (std::size_t i = 0; i < args.rows.size(); ++i) {
    const SamplingRow& row = args.rows[i];
    const bool changes = changes_logits(row), counts = penalised(row), wants_top = row.num_logprobs > 0;
    const bool integers = counts || wants_top || is_filtered(row, vocab_size);
    const std::int64_t keys =
        row.num_logprobs > kBins
            ? static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(row.num_logprobs)))
            : 0;
    const bool works = changes || integers;
    if (works && working == most_working) close_group();
    working += works;
    const auto bias = sorted_bias(row);
    const bool prompt = row.repetition_penalty != 1.0f;
    table.rows.push_back({
        .temperature = row.temperature,
        .top_p = row.top_p,
        .min_p = row.min_p,
        .presence_penalty = row.presence_penalty,
        .frequency_penalty = row.frequency_penalty,
        .repetition_penalty = row.repetition_penalty,
        .top_k = row.top_k,
        .num_logprobs = std::max(row.num_logprobs, 0),
        .seed = row.seed,
        .counter = row.counter,
        .bias = table.append(std::span<const TokenLogprob>(bias)),
        .num_bias = static_cast<std::int64_t>(bias.size()),
        .prompt = prompt ? table.append(row.prompt) : 0,
        .num_prompt = prompt ? static_cast<std::int64_t>(row.prompt.size()) : 0,
        .generated = counts ? table.append(row.generated) : 0,
        .num_generated = counts ? static_cast<std::int64_t>(row.generated.size()) : 0,
        .forbidden = table.append(row.forbidden),
        .num_forbidden = static_cast<std::int64_t>(row.forbidden.size()),
        .top = table.num_top,
        .sort_keys = keys > 0 ? group.sort_keys : -1,
        .adjusted = changes ? static_cast<std::int32_t>(group.adjusted) : -1,
        .integers = integers ? static_cast<std::int32_t>(group.integers) : -1,
        .greedy = is_greedy(row),
    });
    table.num_top += std::max(row.num_logprobs, 0);
    if (changes) adjusted_rows.push_back(static_cast<std::int32_t>(i));
    group.adjusted += changes, group.integers += integers, group.sort_keys += keys, group.end += 1;
  }
  close_group();
  std::memcpy(table.bytes.data(), table.rows.data(), table.rows.size() * sizeof(SampleRow));
  return table;
}

/// Peaks of all rows of a matrix, in parts.
struct Peaks {
  RowPeak* peaks;
  int parts;
};

Peaks launch_peaks(OpContext& context, const TensorView& logits) {
  const std::int64_t rows = logits.shape(0), vocab_size = logits.shape(1);
  const std::int64_t wanted = divide_up(4 * stream_of(context).num_multiprocessors, rows);
  const std::int64_t parts = std::min(wanted, divide_up(vocab_size, kLeastPart));
  const std::int64_t part_width = divide_up(divide_up(vocab_size, parts), kPackElements) * kPackElements;
  const auto used = static_cast<int>(divide_up(vocab_size, part_width));
  const Peaks peaks{context.scratch->allocate<RowPeak>(static_cast<std::size_t>(rows * used)), used};
  launch(all_packs(vocab_size, logits) ? peak_kernel<kPackElements> : peak_kernel<1>,
         dim3(static_cast<unsigned>(rows), static_cast<unsigned>(used)), dim3(kPeakThreads), kPeakSharedBytes,
         handle_of(context), rows_of(logits), vocab_size, part_width, peaks.peaks);
  check_launch(SampleArgs::kName);
  return peaks;
}

void launch_group(OpContext& context, const SampleArgs& args, const Group& group, Sampling sampling, bool any_top) {
  const Arena::Scope scope(*context.scratch);
  const std::int64_t vocab_size = sampling.vocab_size;
  const dim3 grid(static_cast<unsigned>(group.end - group.begin)), threads(kSelectThreads);
  const TensorView logits = args.logits.rows(group.begin, group.end);
  sampling.logits = logits.as<const float>();
  sampling.rows += group.begin;
  sampling.peaks += group.begin * sampling.parts;
  sampling.outcomes += group.begin;
  if (group.integers > 0)
    sampling.integers = context.scratch->allocate<std::int32_t>(static_cast<std::size_t>(group.integers * vocab_size));
  if (group.sort_keys > 0)
    sampling.sort_keys = context.scratch->allocate<std::uint64_t>(static_cast<std::size_t>(group.sort_keys));
  if (group.adjusted > 0) {
    const std::int64_t stride = divide_up(vocab_size, kPackElements) * kPackElements;
    TensorView adjusted(context.scratch->allocate<float>(static_cast<std::size_t>(group.adjusted * stride)),
                        DType::kFloat32, {group.adjusted, vocab_size});
    adjusted.set_stride(0, stride);
    const auto* index = reinterpret_cast<const std::int32_t*>(sampling.lists + group.adjusted_index);
    map_rows(CopyRows{rows_of(args.logits), rows_of(adjusted), index, args.logits.shape(0), false}, group.adjusted,
             vocab_size, all_packs(vocab_size, args.logits, adjusted), handle_of(context));
    check_launch(args.kName);
    sampling.adjusted = adjusted.as<float>();
    sampling.adjusted_stride = stride;
    launch(adjust_kernel, grid, threads, 0, handle_of(context), sampling);
    check_launch(args.kName);
    const Peaks peaks = launch_peaks(context, adjusted);
    sampling.adjusted_peaks = peaks.peaks;
    sampling.adjusted_parts = peaks.parts;
  }
  launch(draw_kernel, grid, threads, sizeof(SelectShared), handle_of(context), sampling);
  check_launch(args.kName);
  if (!any_top) return;
  launch(top_logprobs_kernel, grid, threads, sizeof(SelectShared), handle_of(context), sampling);
  check_launch(args.kName);
}

// Nothing is written before every row has been judged.
void read_results(const SampleArgs& args, const Table& table, const SampleOutcome* outcomes, const TokenLogprob* top) {
  for (std::size_t i = 0; i < args.rows.size(); ++i)
    require<Error>(outcomes[i].status != RowStatus::kBadLogits, SampleArgs::kName, ": row ", i,
                   " of the logits has NaN, +infinity or nothing but -infinity");
  for (std::size_t i = 0; i < args.rows.size(); ++i)
    require<Error>(outcomes[i].status != RowStatus::kNothingLeft, SampleArgs::kName, ": row ", i,
                   " has no token left to choose from");
  for (std::size_t i = 0; i < args.rows.size(); ++i) {
    args.results[i].token = outcomes[i].token;
    args.results[i].logprob = outcomes[i].logprob;
    for (std::int32_t j = 0; j < table.rows[i].num_logprobs; ++j) {
      const TokenLogprob& entry = top[table.rows[i].top + j];
      args.results[i].top[static_cast<std::size_t>(j)] = {entry.token, entry.logprob};
    }
  }
}

void sample(OpContext& context, const SampleArgs& args) {
  const std::int64_t num_rows = args.logits.shape(0), vocab_size = args.logits.shape(1);
  if (num_rows == 0) return;
  const Arena::Scope scope(*context.scratch);
  // A block a row fills a multiprocessor: more rows at once would not be faster.
  const Table table = build_table(args, stream_of(context).num_multiprocessors);
  const std::byte* bytes = on_device(context, std::span<const std::byte>(table.bytes));
  const auto outcome_bytes = static_cast<std::size_t>(num_rows) * sizeof(SampleOutcome);
  const std::size_t result_bytes = outcome_bytes + static_cast<std::size_t>(table.num_top) * sizeof(TokenLogprob);
  auto* results = context.scratch->allocate<std::byte>(result_bytes);
  const Peaks peaks = launch_peaks(context, args.logits);
  const int unit_bits = std::min(44, 62 - static_cast<int>(std::bit_width(static_cast<std::uint64_t>(vocab_size))));
  const Sampling sampling{
      .logits = nullptr,
      .stride = args.logits.stride(0),
      .vocab_size = vocab_size,
      .lists = bytes,
      .rows = reinterpret_cast<const SampleRow*>(bytes),
      .peaks = peaks.peaks,
      .parts = peaks.parts,
      .adjusted = nullptr,
      .adjusted_stride = 0,
      .adjusted_peaks = nullptr,
      .adjusted_parts = 0,
      .integers = nullptr,
      .sort_keys = nullptr,
      .mass_unit = std::ldexp(1.0f, unit_bits),
      .outcomes = reinterpret_cast<SampleOutcome*>(results),
      .top = reinterpret_cast<TokenLogprob*>(results + outcome_bytes),
  };
  for (const Group& group : table.groups) launch_group(context, args, group, sampling, table.num_top > 0);

  std::vector<std::byte> host(result_bytes);
  stream_of(context).staging.download(host.data(), results, result_bytes);
  read_results(args, table, reinterpret_cast<const SampleOutcome*>(host.data()),
               reinterpret_cast<const TokenLogprob*>(host.data() + outcome_bytes));
}

}  // namespace

std::int64_t sampling_scratch(const ScratchShape& s, const DeviceSize& device) {
  const std::int64_t working = std::min(s.sampled_rows, device.num_multiprocessors);
  const std::int64_t peaks =
      2 * (s.sampled_rows + 4 * device.num_multiprocessors) * static_cast<std::int64_t>(sizeof(RowPeak));
  // A row's lists: its tokens once for each penalty, biases, forbidden tokens; its results.
  const std::int64_t lists = s.sampled_rows * (static_cast<std::int64_t>(sizeof(SampleRow)) + 8 * s.positions + 8192);
  const std::int64_t results = s.sampled_rows * (64 + kBins * static_cast<std::int64_t>(sizeof(TokenLogprob)));
  return working * (s.vocab_size + kPackElements) * 8 + peaks + lists + results;
}

void register_sampling(OpRegistry& registry) { registry.add<SampleArgs>(DeviceKind::kCuda, sample); }

}  // namespace flexcore::cuda
