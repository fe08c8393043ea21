#include "backends/cpu/token_draw.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/philox.h"

namespace flexcore::cpu {

namespace {

// How far below the maximum candidates are looked for first, in nats: e^-10 each, a few hundred of a trained model's
// tokens.
constexpr float kFirstReach = 10.0f, kLastReach = 200.0f;

/// Some tokens of a row, ascending by id; unnormalised probabilities relative to the most likely token's.
struct Candidates {
  DrawScratch& scratch;
  std::int64_t count = 0;

  /// Drops those for which keep(i) is false.
  template <class Keep>
  void filter(Keep&& keep) {
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      if (!keep(i)) continue;
      scratch.values[kept] = scratch.values[i];
      scratch.ids[kept] = scratch.ids[i];
      scratch.probabilities[kept++] = scratch.probabilities[i];
    }
    count = kept;
  }
  /// More likely, or as likely with the lower id.
  bool before(std::int32_t a, std::int32_t b) const {
    return scratch.values[a] > scratch.values[b] || (scratch.values[a] == scratch.values[b] && a < b);
  }
};

/// Takes at least `k` tokens, the k most likely among them, and few others: k different blocks reach the k-th highest
/// of the blocks' maxima.
std::int64_t collect_top(std::span<const float> logits, std::int64_t k, DrawScratch& scratch) {
  const auto size = static_cast<std::int64_t>(logits.size());
  float* maxima = scratch.values;
  const std::int64_t blocks = softmax_kernels().block_maxima(logits.data(), size, maxima);
  float threshold = -std::numeric_limits<float>::infinity();
  if (k <= blocks) {
    std::nth_element(maxima, maxima + k - 1, maxima + blocks, std::greater<>());
    threshold = maxima[k - 1];
  }
  return softmax_kernels().collect(logits.data(), size, threshold, scratch.values, scratch.ids);
}

/// Takes tokens from the top down to a reach that grows until `enough(count)`, or all of them.
template <class Enough>
std::int64_t collect_until(std::span<const float> logits, float max, float temperature, DrawScratch& scratch,
                           Enough&& enough) {
  const auto size = static_cast<std::int64_t>(logits.size());
  for (float reach = kFirstReach; reach < kLastReach; reach *= 2) {
    const float threshold = max - reach * temperature;
    const std::int64_t count = softmax_kernels().collect(logits.data(), size, threshold, scratch.values, scratch.ids);
    if (enough(count)) return count;
  }
  return softmax_kernels().collect(logits.data(), size, -std::numeric_limits<float>::infinity(), scratch.values,
                                   scratch.ids);
}

// Ties with the k-th stay, as in Hugging Face's and vLLM's masks.
void keep_top_k(Candidates& c, std::int64_t k) {
  if (k >= c.count) return;
  auto* order = c.scratch.order;
  std::iota(order, order + c.count, 0);
  std::nth_element(order, order + k - 1, order + c.count,
                   [&](std::int32_t a, std::int32_t b) { return c.before(a, b); });
  const float kth = c.scratch.values[order[k - 1]];
  c.filter([&](std::int64_t i) { return c.scratch.values[i] >= kth; });
}

// Keeps the fewest tokens, most likely first, whose mass reaches `mass`: a selection by halves, without a sort.
void keep_mass(Candidates& c, double mass) {
  auto* order = c.scratch.order;
  std::iota(order, order + c.count, 0);
  std::int64_t low = 0, high = c.count;  // the last token to keep is in [low, high)
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    std::nth_element(order + low, order + middle, order + high,
                     [&](std::int32_t a, std::int32_t b) { return c.before(a, b); });
    double upper = 0;
    for (std::int64_t i = low; i < middle; ++i) upper += c.scratch.probabilities[order[i]];
    if (upper >= mass) {
      high = middle;
    } else {
      mass -= upper;
      low = middle;
    }
  }
  const float value = c.scratch.values[order[low]];
  const std::int64_t last = order[low];
  // Filtering moves what lies before i only, so positions stay comparable.
  c.filter([&](std::int64_t i) { return c.scratch.values[i] > value || (c.scratch.values[i] == value && i <= last); });
}

/// The index at which the running sum of `p` first exceeds `point` times the whole sum.
std::int64_t pick(const float* p, std::int64_t size, double point) {
  constexpr std::int64_t kBlock = 512;
  const auto block_sum = [&](std::int64_t begin) {
    double sums[4] = {};
    const std::int64_t end = std::min(begin + kBlock, size);
    std::int64_t i = begin;
    for (; i + 4 <= end; i += 4)
      for (int l = 0; l < 4; ++l) sums[l] += static_cast<double>(p[i + l]);
    for (; i < end; ++i) sums[0] += static_cast<double>(p[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  };
  double total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kBlock) total += block_sum(begin);
  double left = point * total;
  std::int64_t last_possible = 0;  // rounding may leave the point beyond the last token
  for (std::int64_t begin = 0; begin < size; begin += kBlock) {
    const double sum = block_sum(begin);
    if (sum <= 0) continue;
    const bool inside = left < sum;
    for (std::int64_t i = begin; i < std::min(begin + kBlock, size); ++i) {
      if (p[i] > 0) last_possible = i;
      if (inside && (left -= static_cast<double>(p[i])) < 0) return i;
    }
    if (inside) return last_possible;
    left -= sum;
  }
  return last_possible;
}

}  // namespace

void adjust_logits(const SamplingRow& row, DrawScratch& scratch) {
  float* logits = scratch.logits;
  for (const auto& [token, bias] : row.logit_bias) logits[token] += bias;
  const bool repetition = row.repetition_penalty != 1.0f;
  if (repetition || row.presence_penalty != 0 || row.frequency_penalty != 0) {
    // Counts of generated tokens, -1 for those of the prompt alone. Each token is dealt with once and cleared.
    auto* counts = scratch.counts;
    for (const auto token : row.generated) ++counts[token];
    if (repetition)
      for (const auto token : row.prompt)
        if (counts[token] == 0) counts[token] = -1;
    const auto settle = [&](std::int32_t token) {
      const std::int32_t count = std::exchange(counts[token], 0);
      if (count == 0) return;
      float& x = logits[token];
      x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
      if (count > 0) x -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
    };
    for (const auto token : row.generated) settle(token);
    if (repetition)
      for (const auto token : row.prompt) settle(token);
  }
  for (const auto token : row.forbidden) logits[token] = -std::numeric_limits<float>::infinity();
}

std::int32_t draw_token(const SamplingRow& row, std::span<const float> logits, const RowPeak& peak,
                        DrawScratch& scratch) {
  const auto size = static_cast<std::int64_t>(logits.size());
  const float inverse = 1 / row.temperature;
  const double point = uniform(row.seed, row.counter);
  const bool by_k = row.top_k > 0 && row.top_k < size, by_mass = row.top_p < 1;
  if (!by_k && !by_mass && row.min_p == 0) {
    softmax_kernels().exponentials(logits.data(), size, peak.max, inverse, scratch.probabilities);
    return static_cast<std::int32_t>(pick(scratch.probabilities, size, point));
  }

  Candidates c{scratch};
  const auto weigh = [&](std::int64_t count) {
    return softmax_kernels().exponentials(scratch.values, count, peak.max, inverse, scratch.probabilities);
  };
  double mass = 0;  // of what top_p refers to
  if (by_k) {
    c.count = collect_top(logits, row.top_k, scratch);
    weigh(c.count);
    keep_top_k(c, row.top_k);
    for (std::int64_t i = 0; i < c.count; ++i) mass += scratch.probabilities[i];
  } else if (by_mass) {
    mass = softmax_kernels().exponentials(logits.data(), size, peak.max, inverse, scratch.probabilities);
    c.count = collect_until(logits, peak.max, row.temperature, scratch,
                            [&](std::int64_t count) { return weigh(count) >= row.top_p * mass; });
    weigh(c.count);
  } else {
    // A little below the bound; the exact test follows.
    const float threshold = peak.max + (std::log(row.min_p) - 0.01f) * row.temperature;
    c.count = softmax_kernels().collect(logits.data(), size, threshold, scratch.values, scratch.ids);
    weigh(c.count);
  }
  if (by_mass) keep_mass(c, row.top_p * mass);
  if (row.min_p > 0) c.filter([&](std::int64_t i) { return scratch.probabilities[i] >= row.min_p; });
  return scratch.ids[pick(scratch.probabilities, c.count, point)];
}

void top_log_probabilities(std::span<const float> logits, double log_sum_exp,
                           std::span<std::pair<std::int32_t, float>> top, DrawScratch& scratch) {
  const auto wanted = static_cast<std::int64_t>(top.size());
  if (wanted == 0) return;
  Candidates c{scratch};
  c.count = collect_top(logits, wanted, scratch);
  auto* order = scratch.order;
  std::iota(order, order + c.count, 0);
  std::partial_sort(order, order + wanted, order + c.count,
                    [&](std::int32_t a, std::int32_t b) { return c.before(a, b); });
  for (std::int64_t i = 0; i < wanted; ++i)
    top[i] = {scratch.ids[order[i]], static_cast<float>(static_cast<double>(scratch.values[order[i]]) - log_sum_exp)};
}

}  // namespace flexcore::cpu
