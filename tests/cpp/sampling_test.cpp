#include "ops/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "core/philox.h"
#include "op_fixture.h"

namespace flexcore::test {
namespace {

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

using Top = std::vector<std::pair<std::int32_t, float>>;

SamplingResult sample_one(Matrix logits, const SamplingRow& row, Top* top = nullptr) {
  SamplingResult result;
  if (top) {
    top->assign(std::max(row.num_logprobs, 0), {-1, 0.0f});
    result.top = *top;
  }
  fixture().run(SampleArgs{logits.view(), {&row, 1}, {&result, 1}});
  return result;
}

/// The op's definition in double, with a full sort: probability of each token, zero where it is cut off.
std::vector<double> distribution(const Matrix& logits, const SamplingRow& row) {
  const auto n = static_cast<std::size_t>(logits.width());
  std::vector<double> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = logits(0, i);
  for (const auto& [token, bias] : row.logit_bias) x[token] += bias;
  std::set<std::int32_t> seen(row.prompt.begin(), row.prompt.end());
  seen.insert(row.generated.begin(), row.generated.end());
  for (const auto t : seen) x[t] = x[t] > 0 ? x[t] / row.repetition_penalty : x[t] * row.repetition_penalty;
  std::map<std::int32_t, int> counts;
  for (const auto t : row.generated) ++counts[t];
  for (const auto& [t, count] : counts) x[t] -= row.frequency_penalty * count + row.presence_penalty;
  for (const auto t : row.forbidden) x[t] = -INFINITY;

  const double top = *std::max_element(x.begin(), x.end());
  std::vector<double> p(n);
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return x[a] > x[b]; });
  for (std::size_t i = 0; i < n; ++i) p[i] = std::exp((x[i] - top) / row.temperature);
  if (row.top_k > 0 && row.top_k < static_cast<int>(n))
    for (std::size_t i = 0; i < n; ++i)
      if (x[i] < x[order[row.top_k - 1]]) p[i] = 0;
  if (row.top_p < 1) {
    const double wanted = row.top_p * std::accumulate(p.begin(), p.end(), 0.0);
    double sum = 0;
    for (const auto i : order) {
      if (sum >= wanted) p[i] = 0;
      sum += p[i];
    }
  }
  for (auto& v : p)
    if (v < row.min_p) v = 0;
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (auto& v : p) v /= total;
  return p;
}

// The token is the one that the draw points at, up to rounding.
void expect_drawn(const std::vector<double>& p, const SamplingRow& row, std::int32_t token) {
  ASSERT_TRUE(0 <= token && token < static_cast<std::int32_t>(p.size()));
  const double point = uniform(row.seed, row.counter), below = std::accumulate(p.begin(), p.begin() + token, 0.0);
  EXPECT_GT(p[token], 0) << token;
  EXPECT_GE(point, below - 1e-5) << token;
  EXPECT_LE(point, below + p[token] + 1e-5) << token;
}

double log_probability(const Matrix& logits, std::int64_t row, std::int32_t token) {
  double top = -1e300, sum = 0;
  for (std::int64_t i = 0; i < logits.width(); ++i) top = std::max(top, logits(row, i));
  for (std::int64_t i = 0; i < logits.width(); ++i) sum += std::exp(logits(row, i) - top);
  return logits(row, token) - top - std::log(sum);
}

// Known answers of the Random123 distribution.
static_assert(philox({0, 0}, {0, 0, 0, 0}) ==
              std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox({~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}) ==
              std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox({0xa4093822, 0x299f31d0}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}) ==
              std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

TEST(Sampling, GreedyTakesTheLowestOfTheBestAndItsLogprob) {
  std::mt19937 rng(1);
  for (const std::int64_t vocab : {1, 7, 64, 2048, 5003, 49152}) {
    auto logits = Matrix::random(DType::kFloat32, 3, vocab, rng, 4.0f, 5);
    const std::int64_t best[] = {vocab - 1, vocab / 2, 0};
    for (int i = 0; i < 3; ++i) logits.set(i, best[i], 30.0f);
    logits.set(1, vocab - 1, 30.0f);
    if (vocab > 3) logits.set(2, 2, -INFINITY);
    const std::vector<SamplingRow> rows(3, SamplingRow{.temperature = 0.0f});
    std::vector<SamplingResult> results(3);
    fixture().run(SampleArgs{logits.view(), rows, results});
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(results[i].token, best[i]) << vocab;
      EXPECT_NEAR(results[i].logprob, log_probability(logits, i, results[i].token), 1e-5);
    }
  }
}

TEST(Sampling, DrawsFollowTheDefinition) {
  std::mt19937 rng(2);
  struct Filter {
    float temperature, top_p, min_p;
    std::int32_t top_k;
  };
  const Filter filters[] = {{1, 1, 0, 0},        {0.7f, 0.9f, 0, -1},  {1.3f, 1, 0, 5},         {1, 0.5f, 0, 40},
                            {1, 1, 0.05f, 0},    {2, 0.95f, 0.01f, 0}, {0.3f, 0.999f, 0.2f, 3}, {1, 1e-6f, 0, 0},
                            {50, 0.7f, 0, 3000}, {1, 1, 1, 0},         {1e3f, 0.3f, 0, 0}};
  for (const std::int64_t vocab : {1, 3, 100, 6000})
    for (const float scale : {0.01f, 1.0f, 6.0f})
      for (const auto& f : filters)
        for (std::uint64_t counter = 0; counter < (emulated() ? 3 : 12); ++counter) {
          auto logits = Matrix::random(DType::kFloat32, 1, vocab, rng, scale);
          if (vocab > 10) logits.set(0, 7, logits(0, 3)), logits.set(0, 5, -INFINITY);
          const SamplingRow row{.temperature = f.temperature,
                                .top_p = f.top_p,
                                .min_p = f.min_p,
                                .top_k = f.top_k,
                                .seed = 1234567890123,
                                .counter = counter};
          const auto result = sample_one(logits, row);
          expect_drawn(distribution(logits, row), row, result.token);
          EXPECT_NEAR(result.logprob, log_probability(logits, 0, result.token), 1e-5);
        }
}

TEST(Sampling, PenaltiesBiasAndMask) {
  std::mt19937 rng(3);
  const std::vector<std::int32_t> prompt = {1, 2, 2, 9}, generated = {2, 5, 5, 5, 11}, forbidden = {0, 20};
  const std::vector<std::pair<std::int32_t, float>> bias = {{4, 3.0f}, {4, 1.0f}, {6, -INFINITY}};
  for (const float temperature : {0.0f, 1.0f})
    for (std::uint64_t counter = 0; counter < 30; ++counter) {
      const auto logits = Matrix::random(DType::kFloat32, 1, 24, rng, 2.0f);
      SamplingRow row{.temperature = temperature,
                      .presence_penalty = 0.5f,
                      .frequency_penalty = 0.7f,
                      .repetition_penalty = 1.4f,
                      .seed = 5,
                      .counter = counter,
                      .prompt = prompt,
                      .generated = generated,
                      .logit_bias = bias,
                      .forbidden = forbidden};
      const auto token = sample_one(logits, row).token;
      if (temperature > 0) {
        expect_drawn(distribution(logits, row), row, token);
      } else {
        row.temperature = 1.0f;
        const auto p = distribution(logits, row);
        EXPECT_EQ(token, std::max_element(p.begin(), p.end()) - p.begin());
      }
    }
}

TEST(Sampling, TopLogprobsAreSortedAndRaw) {
  std::mt19937 rng(4);
  for (const std::int64_t vocab : {6, 3000})
    for (const float scale : {0.0f, 1.0f, 100.0f}) {
      auto logits = Matrix::random(DType::kFloat32, 1, vocab, rng, scale);
      logits.set(0, 4, logits(0, 1));
      const std::vector<std::int32_t> forbidden = {1};
      for (const std::int32_t k : {0, 1, 5, 6}) {
        Top top;
        const auto result = sample_one(logits, {.temperature = 0.0f, .forbidden = forbidden, .num_logprobs = k}, &top);
        EXPECT_NE(result.token, 1);
        std::vector<std::int32_t> order(vocab);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return logits(0, a) > logits(0, b); });
        for (std::int32_t i = 0; i < k; ++i) {
          EXPECT_EQ(top[i].first, order[i]);
          EXPECT_NEAR(top[i].second, log_probability(logits, 0, order[i]), 1e-4);
        }
      }
    }
}

TEST(Sampling, FrequenciesMatchProbabilities) {
  Matrix logits(DType::kFloat32, 1, 5);
  const double p[] = {0.05, 0.4, 0.2, 0.25, 0.1};
  for (int i = 0; i < 5; ++i) logits.set(0, i, static_cast<float>(std::log(p[i])));
  const int kDraws = emulated() ? 500 : 20000;
  std::array<int, 5> counts{};
  for (int i = 0; i < kDraws; ++i)
    ++counts[sample_one(logits, {.seed = 77, .counter = static_cast<std::uint64_t>(i)}).token];
  for (int i = 0; i < 5; ++i) EXPECT_NEAR(counts[i], kDraws * p[i], 5 * std::sqrt(kDraws * p[i] * (1 - p[i])));
}

TEST(Sampling, TokensDoNotDependOnTheBatchOrThreads) {
  std::mt19937 rng(5);
  constexpr int kRows = 17;
  const auto logits = Matrix::random(DType::kFloat32, kRows, 1000, rng, 3.0f);
  std::vector<SamplingRow> rows;
  for (std::uint64_t i = 0; i < kRows; ++i)
    rows.push_back(
        {.temperature = 0.9f, .top_p = i % 2 ? 0.8f : 1.0f, .top_k = i % 3 ? 50 : 0, .seed = i, .counter = 3});
  std::vector<SamplingResult> results(kRows);
  OpFixture three(3);
  auto batch = logits;
  three.run(SampleArgs{batch.view(), rows, results});
  for (int i = 0; i < kRows; ++i) {
    SamplingResult alone;
    auto copy = logits;
    fixture().run(SampleArgs{copy.view().rows(i, i + 1), {&rows[i], 1}, {&alone, 1}});
    EXPECT_EQ(alone.token, results[i].token) << i;
    EXPECT_EQ(alone.logprob, results[i].logprob) << i;
  }
}

/// Runs an op on the CPU, whatever the device of the tests.
template <class Args>
void run_on_cpu(const Args& args) {
  MemoryLedger ledger;
  Arena scratch(host_allocator(), ledger);
  ThreadPool threads(1);
  const OpRegistry registry = make_op_registry();
  OpContext context;
  context.registry = &registry;
  context.threads = &threads;
  context.scratch = &scratch;
  flexcore::run(context, args);
}

// Every filter, with and without penalties, ties and lists longer than a block, in one batch; on a GPU in several
// groups of rows. Draws may differ where they fall on a border between two tokens.
TEST(Sampling, BatchesEqualTheCpu) {
  std::mt19937 rng(8);
  constexpr float kTopP[] = {1.0f, 0.9f, 0.5f, 0.999f}, kMinP[] = {0.0f, 0.0f, 0.03f};
  constexpr std::int32_t kTopK[] = {0, 1, 40, 1500, 2999}, kLogprobs[] = {-1, 0, 3, 1500, 3000};
  for (const std::int64_t vocab : {3000, 9001})
    for (const float step : {0.0f, 0.5f}) {  // logits are multiples of it: ties
      constexpr std::int64_t kRows = 22;
      auto logits = Matrix::random(DType::kFloat32, kRows, vocab, rng, 3.0f, 3);
      if (step > 0)
        for (std::int64_t i = 0; i < kRows; ++i)
          for (std::int64_t j = 0; j < vocab; ++j)
            logits.set(i, j, step * std::round(static_cast<float>(logits(i, j)) / step));
      std::vector<std::vector<std::int32_t>> lists;
      std::vector<std::vector<std::pair<std::int32_t, float>>> biases;
      lists.reserve(3 * kRows), biases.reserve(kRows);
      const auto tokens = [&](std::size_t count) {
        auto& list = lists.emplace_back(count);
        for (auto& token : list) token = static_cast<std::int32_t>(rng() % static_cast<unsigned>(vocab));
        return std::span<const std::int32_t>(list);
      };
      std::vector<SamplingRow> rows;
      for (std::int64_t i = 0; i < kRows; ++i) {
        SamplingRow row{.temperature = i % 7 == 6 ? 0.0f : 0.5f + 0.3f * static_cast<float>(i % 4),
                        .top_p = kTopP[rng() % 4],
                        .min_p = kMinP[rng() % 3],
                        .top_k = kTopK[rng() % 5],
                        .seed = static_cast<std::uint64_t>(i) << 33,
                        .counter = rng(),
                        .num_logprobs = kLogprobs[rng() % 5]};
        if (i % 3 == 1)
          row.repetition_penalty = 1.3f, row.prompt = tokens(2500), row.generated = tokens(i % 2 ? 0 : 70);
        if (i % 5 == 2) row.presence_penalty = 0.4f, row.frequency_penalty = -0.2f, row.generated = tokens(1300);
        if (i % 4 == 3) row.forbidden = tokens(40);
        if (i % 6 == 5) {
          auto& bias = biases.emplace_back();
          for (int j = 0; j < 1200; ++j)
            bias.emplace_back(rng() % static_cast<unsigned>(vocab), 0.01f * static_cast<float>(j % 300));
          row.logit_bias = bias;
        }
        rows.push_back(row);
      }
      const auto sample = [&](auto&& run, std::vector<Top>& tops) {
        std::vector<SamplingResult> results(kRows);
        tops.resize(kRows);
        for (std::size_t i = 0; i < rows.size(); ++i) {
          tops[i].assign(static_cast<std::size_t>(std::max(rows[i].num_logprobs, 0)), {-1, 0.0f});
          results[i].top = tops[i];
        }
        auto copy = logits;
        run(SampleArgs{copy.view(), rows, results});
        return results;
      };
      std::vector<Top> tops, wanted_tops;
      const auto results = sample([](const SampleArgs& args) { fixture().run(args); }, tops);
      const auto wanted = sample([](const SampleArgs& args) { run_on_cpu(args); }, wanted_tops);
      int other = 0;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        if (results[i].token != wanted[i].token) {
          ++other;
          Matrix row(DType::kFloat32, 1, vocab);
          for (std::int64_t j = 0; j < vocab; ++j)
            row.set(0, j, static_cast<float>(logits(static_cast<std::int64_t>(i), j)));
          expect_drawn(distribution(row, rows[i]), rows[i], results[i].token);
        } else {
          EXPECT_NEAR(results[i].logprob, wanted[i].logprob, 1e-5);
        }
        for (std::size_t j = 0; j < tops[i].size(); ++j) {
          ASSERT_EQ(tops[i][j].first, wanted_tops[i][j].first) << i << " " << j;
          ASSERT_NEAR(tops[i][j].second, wanted_tops[i][j].second, 1e-5);
        }
      }
      EXPECT_LE(other, 1);
    }
}

TEST(Sampling, VocabulariesMayBeLarge) {
  std::mt19937 rng(9);
  constexpr std::int64_t kVocab = 600001;
  auto logits = Matrix::random(DType::kFloat32, 3, kVocab, rng, 2.0f);
  const SamplingRow rows[] = {{.seed = 3}, {.top_p = 0.95f, .seed = 4}, {.top_k = 50, .seed = 5, .num_logprobs = 4}};
  Top top(4), wanted_top(4);
  std::vector<SamplingResult> results(3), wanted(3);
  results[2].top = top, wanted[2].top = wanted_top;
  fixture().run(SampleArgs{logits.view(), rows, results});
  run_on_cpu(SampleArgs{logits.view(), rows, wanted});
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(results[i].token, wanted[i].token) << i;
    EXPECT_NEAR(results[i].logprob, wanted[i].logprob, 1e-5);
  }
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(top[i].first, wanted_top[i].first);
}

TEST(Sampling, BadRowsAreNamedAndNothingIsSet) {
  std::mt19937 rng(6);
  for (const float bad : {NAN, INFINITY}) {
    auto logits = Matrix::random(DType::kFloat32, 3, 3000, rng);
    logits.set(1, 2999, bad);
    const std::vector<SamplingRow> rows(3);
    std::vector<SamplingResult> results(3, SamplingResult{.token = -7});
    try {
      fixture().run(SampleArgs{logits.view(), rows, results});
      FAIL();
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("row 1 of the logits"), std::string::npos);
    }
    for (const auto& result : results) EXPECT_EQ(result.token, -7);
  }
  const auto logits = Matrix::random(DType::kFloat32, 1, 2, rng);
  const std::vector<std::int32_t> both = {0, 1}, outside = {2};
  EXPECT_THROW(sample_one(logits, {.forbidden = both}), Error);
  EXPECT_THROW(sample_one(logits, {.forbidden = outside}), InvalidArgument);
  EXPECT_THROW(sample_one(logits, {.temperature = -1.0f}), InvalidArgument);
  EXPECT_THROW(sample_one(logits, {.top_p = 0.0f}), InvalidArgument);
  EXPECT_THROW(sample_one(logits, {.num_logprobs = 1}), InvalidArgument);
  fixture().run(SampleArgs{Matrix(DType::kFloat32, 0, 2).view(), {}, {}});
}

}  // namespace
}  // namespace flexcore::test
