#pragma once

#include "backends/cuda/kernels/philox.cuh"
#include "backends/cuda/kernels/rows.cuh"
#include "backends/cuda/kernels/select.cuh"

// From logits to tokens. The floor is one reading of the logits (peak_kernel, all multiprocessors); rows that draw are
// read two or three times more, by a block each, from the second-level cache.

namespace flexcore::cuda {

inline constexpr int kPeakThreads = 256;

/// A row of logits, or a part of it. `sum` of exp(x - max) is NaN when there is NaN or +infinity.
struct RowPeak {
  float max;
  std::int32_t argmax;  // the lowest id among equals
  double sum;
};

enum class RowStatus : std::int32_t { kChosen, kBadLogits, kNothingLeft };

struct SampleOutcome {
  std::int32_t token;
  float logprob;
  RowStatus status;
  std::int32_t unused;
};

struct TokenLogprob {
  std::int32_t token;
  float logprob;
};

/// How a row is chosen from: ops/sampling.h. Offsets of lists are in bytes from the table's beginning.
struct SampleRow {
  float temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::int32_t top_k;
  std::int32_t num_logprobs;  // 0: none
  std::uint64_t seed, counter;
  std::int64_t bias, num_bias;  // TokenLogprob: token and bias, ascending by token
  std::int64_t prompt, num_prompt, generated, num_generated, forbidden, num_forbidden;  // tokens
  std::int64_t top;        // index of the first of num_logprobs results
  std::int64_t sort_keys;  // index of the row's first sort key; -1: few enough for shared memory
  std::int32_t adjusted;   // row of the adjusted logits; -1: logits are taken as they are
  std::int32_t integers;   // row of the integers; -1: not needed
  bool greedy;
};

struct Sampling {
  const float* logits;  // [rows, vocab_size]
  std::int64_t stride, vocab_size;
  const std::byte* lists;
  const SampleRow* rows;
  const RowPeak* peaks;  // [rows, parts]
  int parts;
  float* adjusted;  // [.., adjusted_stride]
  std::int64_t adjusted_stride;
  const RowPeak* adjusted_peaks;  // [.., adjusted_parts]
  int adjusted_parts;
  std::int32_t* integers;  // [.., vocab_size]
  std::uint64_t* sort_keys;
  float mass_unit;  // probabilities are added as whole multiples of 1 / mass_unit, a power of two
  SampleOutcome* outcomes;
  TokenLogprob* top;
};

__device__ __forceinline__ void take_higher(RowPeak& a, const RowPeak& b) {
  const bool higher = b.max > a.max || (b.max == a.max && b.argmax < a.argmax);
  a.max = higher ? b.max : a.max;
  a.argmax = higher ? b.argmax : a.argmax;
}
__device__ __forceinline__ void warp_take_highest(RowPeak& peak) {
  FLEXCORE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    take_higher(peak,
                {__shfl_xor_sync(kAllLanes, peak.max, distance), __shfl_xor_sync(kAllLanes, peak.argmax, distance), 0});
}

/// peaks[row, part] of part_width columns each.
template <int N>
__global__ void __launch_bounds__(kPeakThreads)
    peak_kernel(const Rows logits, std::int64_t vocab_size, std::int64_t part_width, RowPeak* peaks) {
  FLEXCORE_SHARED(shared);
  const float lowest = __int_as_float(0xff800000);
  const std::int64_t begin = blockIdx.y * part_width;
  const std::int64_t end = begin + part_width < vocab_size ? begin + part_width : vocab_size;
  RowPeak peak{lowest, static_cast<std::int32_t>(begin), 0};
  float sum = 0.0f;
  for (std::int64_t i = begin + static_cast<std::int64_t>(threadIdx.x) * N; i < end; i += kPeakThreads * N) {
    float x[N];
    logits.load<N>(blockIdx.x, i, x);
    float top = peak.max;
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) {
      peak.argmax = x[j] > top ? static_cast<std::int32_t>(i + j) : peak.argmax;
      top = fmaxf(top, x[j]);
    }
    // With nothing but -infinity so far, the differences are taken from 0: they stay -infinity instead of NaN.
    const float base = top == lowest ? 0.0f : top;
    sum = peak.max == top ? sum : sum * expf(peak.max - base);
    FLEXCORE_UNROLL
    for (int j = 0; j < N; ++j) sum += expf(x[j] - base);
    peak.max = top;
  }
  const float own = peak.max;
  auto* slots = reinterpret_cast<RowPeak*>(shared);
  auto* sums = reinterpret_cast<double*>(slots + kWarpSize);
  warp_take_highest(peak);
  if (lane_of_thread() == 0) slots[warp_of_thread()] = peak;
  __syncthreads();
  peak = slots[lane_of_thread() < kPeakThreads / kWarpSize ? lane_of_thread() : 0];
  warp_take_highest(peak);
  peak.sum = block_sum(static_cast<double>(own == peak.max ? sum : sum * expf(own - peak.max)), sums);
  if (threadIdx.x == 0) peaks[static_cast<std::int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = peak;
}

/// The peak of a row from those of its parts; by every warp for itself.
__device__ __forceinline__ RowPeak merge_peaks(const RowPeak* parts, int count) {
  RowPeak peak = parts[0];
  for (int i = lane_of_thread(); i < count; i += kWarpSize) take_higher(peak, parts[i]);
  warp_take_highest(peak);
  double sum = 0;
  for (int i = lane_of_thread(); i < count; i += kWarpSize)
    sum += parts[i].max == peak.max ? parts[i].sum : parts[i].sum * exp(static_cast<double>(parts[i].max - peak.max));
  peak.sum = warp_sum(sum);
  return peak;
}
__device__ __forceinline__ bool sound(const RowPeak& peak) {
  return peak.sum > 0 && peak.sum < 1e300 && peak.max > __int_as_float(0xff800000);
}
__device__ __forceinline__ double log_sum_exp(const RowPeak& peak) {
  return static_cast<double>(peak.max) + log(peak.sum);
}

/// logit_bias, penalties and mask on a copy of the logits. Work grows with the lists, not with the vocabulary.
__global__ void __launch_bounds__(kSelectThreads, 1) adjust_kernel(const Sampling a) {
  const SampleRow& row = a.rows[blockIdx.x];
  if (row.adjusted < 0) return;
  float* logits = a.adjusted + row.adjusted * a.adjusted_stride;
  const auto list = [&](std::int64_t offset) { return reinterpret_cast<const std::int32_t*>(a.lists + offset); };
  const auto each = [&](std::int64_t offset, std::int64_t count, auto&& f) {
    for (std::int64_t i = threadIdx.x; i < count; i += kSelectThreads) f(list(offset)[i]);
  };

  // The first of a token's entries adds them all, in their order.
  const auto* bias = reinterpret_cast<const TokenLogprob*>(a.lists + row.bias);
  for (std::int64_t i = threadIdx.x; i < row.num_bias; i += kSelectThreads) {
    const std::int32_t token = bias[i].token;
    if (i > 0 && bias[i - 1].token == token) continue;
    float x = logits[token];
    for (std::int64_t j = i; j < row.num_bias && bias[j].token == token; ++j) x += bias[j].logprob;
    logits[token] = x;
  }

  const bool repetition = row.repetition_penalty != 1.0f;
  if (repetition || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f) {
    // Counts of generated tokens, -1 for those of the prompt alone. Each token is dealt with once, by the thread that
    // takes its count away.
    std::int32_t* counts = a.integers + row.integers * a.vocab_size;
    const std::int64_t num_prompt = repetition ? row.num_prompt : 0;
    each(row.generated, row.num_generated, [&](std::int32_t token) { counts[token] = 0; });
    each(row.prompt, num_prompt, [&](std::int32_t token) { counts[token] = 0; });
    __syncthreads();
    each(row.generated, row.num_generated, [&](std::int32_t token) { atomicAdd(&counts[token], 1); });
    __syncthreads();
    each(row.prompt, num_prompt, [&](std::int32_t token) { atomicCAS(&counts[token], 0, -1); });
    __syncthreads();
    const auto settle = [&](std::int32_t token) {
      const std::int32_t count = atomicExch(&counts[token], 0);
      if (count == 0) return;
      float x = logits[token];
      x = x > 0.0f ? x / row.repetition_penalty : x * row.repetition_penalty;
      if (count > 0) x -= row.frequency_penalty * static_cast<float>(count) + row.presence_penalty;
      logits[token] = x;
    };
    each(row.generated, row.num_generated, settle);
    each(row.prompt, num_prompt, settle);
  }
  __syncthreads();
  each(row.forbidden, row.num_forbidden, [&](std::int32_t token) { logits[token] = __int_as_float(0xff800000); });
}

/// Candidates of a row: a distance is how far an order_key lies below the highest.
struct Candidates {
  int count;
  unsigned furthest;  // nothing beyond is kept
};

/// Takes at least `k` tokens, the k most likely among them, and few others: of the maxima of so many groups, the k-th
/// is a lower bound.
__device__ __forceinline__ Candidates collect_top(SelectShared& s, const float* x, int n, int k, unsigned highest,
                                                  std::int32_t* ids) {
  const int groups = n < kSelectThreads ? n : kSelectThreads;
  unsigned furthest = highest - order_key(__int_as_float(0xff800000));
  if (k <= groups) {
    float top = __int_as_float(0xff800000);
    over_items(n, [&](int i) { return x[i]; }, [&](int, float v) { top = fmaxf(top, v); });
    s.maxima[threadIdx.x] = top;
    const bool used = static_cast<int>(threadIdx.x) < groups;
    const float least = -block_max(used ? -top : __int_as_float(0xff800000), s.slots);
    Search search{0, highest - order_key(least), static_cast<Weight>(k), 0};
    find_distance(
        s, search, groups, 0, [&](int i) { return s.maxima[i]; },
        [&](float v) { return Entry{highest - order_key(v), 1}; });
    furthest = search.base;
  }
  const int count = collect(s, x, n, ids, [&](float v) { return highest - order_key(v) <= furthest; });
  return {count, furthest};
}

/// What is kept of candidates: those nearer than `distance`, and of those at it the ids up to `last_id`.
struct Cut {
  unsigned distance;
  std::int32_t last_id;

  __device__ __forceinline__ bool keeps(unsigned d, std::int32_t id) const {
    return d < distance || (d == distance && id <= last_id);
  }
};

/// The first `wanted` of the candidates at a distance, by id.
__device__ __forceinline__ std::int32_t last_of_ties(SelectShared& s, const float* x, const std::int32_t* ids,
                                                     int count, unsigned highest, unsigned distance, Weight wanted,
                                                     int vocab_size) {
  Search search{0, static_cast<unsigned>(vocab_size - 1), wanted, 0};
  find_distance(
      s, search, count, 0, [&](int i) { return ids[i]; },
      [&](std::int32_t id) {
        return Entry{static_cast<unsigned>(id), highest - order_key(x[id]) == distance ? Weight{1} : Weight{0}};
      });
  return static_cast<std::int32_t>(search.base);
}

/// temperature, top_k, top_p, min_p and the draw. Tokens are laid end to end by id, each as long as its probability,
/// and the draw is a point on that line.
__device__ __forceinline__ std::int32_t draw_token(const Sampling& a, const SampleRow& row, SelectShared& s,
                                                   const float* x, float max) {
  const int n = static_cast<int>(a.vocab_size);
  const float inverse = 1.0f / row.temperature, min_p = row.min_p;
  const double point = philox_uniform(row.seed, row.counter);
  const auto weigh = [&](float v) { return expf((v - max) * inverse); };
  const bool by_k = row.top_k > 0 && row.top_k < n, by_mass = row.top_p < 1.0f;
  if (!by_k && !by_mass)
    return pick(s, n, point, [&](int i) {
      const float p = weigh(x[i]);
      return p >= min_p ? static_cast<double>(p) : 0.0;
    });

  const auto mass = [&](float v) { return static_cast<Weight>(weigh(v) * a.mass_unit); };
  const unsigned highest = order_key(max);
  std::int32_t* ids = a.integers + row.integers * n;
  Candidates c;
  Search by_weight{};
  double part = static_cast<double>(row.top_p);
  if (by_k) {
    c = collect_top(s, x, n, row.top_k, highest, ids);
    Search kth{0, c.furthest, static_cast<Weight>(row.top_k), 0};
    find_distance(
        s, kth, c.count, 0, [&](int i) { return x[ids[i]]; },
        [&](float v) { return Entry{highest - order_key(v), 1}; });
    c.furthest = kth.base;  // ties with the k-th stay, as in Hugging Face's and vLLM's masks
  } else {
    // Bins of equal width in nats: beyond the last a probability is less than one unit of mass.
    constexpr float kBinsOfNat = 64.0f;
    const auto bin_of = [&](float v) { return static_cast<unsigned>(fminf((max - v) * inverse * kBinsOfNat, kBins)); };
    const Weight total = sum_bins(
        s, n, 0, kBins - 1, 0, [&](int i) { return x[i]; }, [&](float v) { return Entry{bin_of(v), mass(v)}; });
    by_weight.target = static_cast<Weight>(ceil(part * static_cast<double>(total)));
    by_weight.target = by_weight.target > total ? total : by_weight.target;
    part = 0;
    find_bin(s, by_weight.target);
    const auto reach = static_cast<unsigned>(s.found_bin);
    c.count = collect(s, x, n, ids, [&](float v) { return bin_of(v) <= reach; });
    // The candidates' lowest is not below this; a little more for rounding.
    const float lowest = max - static_cast<float>(reach + 2) / kBinsOfNat * row.temperature;
    c.furthest = highest - order_key(lowest) + 2;
  }
  Cut cut{c.furthest, n};
  if (by_mass) {
    by_weight.range = c.furthest;
    find_distance(
        s, by_weight, c.count, part, [&](int i) { return x[ids[i]]; },
        [&](float v) { return Entry{highest - order_key(v), mass(v)}; });
    cut.distance = by_weight.base;
    // Of equals, the fewest that reach the mass.
    const Weight each = mass(from_order_key(highest - cut.distance)), wanted = (by_weight.target + each - 1) / each;
    if (wanted * each < by_weight.weight)
      cut.last_id = last_of_ties(s, x, ids, c.count, highest, cut.distance, wanted, n);
  }
  const int at = pick(s, c.count, point, [&](int i) {
    const std::int32_t id = ids[i];
    const float v = x[id], p = weigh(v);
    return cut.keeps(highest - order_key(v), id) && p >= min_p ? static_cast<double>(p) : 0.0;
  });
  return ids[at];
}

/// One block a row.
__global__ void __launch_bounds__(kSelectThreads) draw_kernel(const Sampling a) {
  FLEXCORE_SHARED(shared);
  const SampleRow& row = a.rows[blockIdx.x];
  const RowPeak raw = merge_peaks(a.peaks + static_cast<std::int64_t>(blockIdx.x) * a.parts, a.parts);
  const float* raw_logits = a.logits + blockIdx.x * a.stride;
  RowPeak peak = raw;
  const float* logits = raw_logits;
  if (row.adjusted >= 0) {
    peak = merge_peaks(a.adjusted_peaks + static_cast<std::int64_t>(row.adjusted) * a.adjusted_parts, a.adjusted_parts);
    logits = a.adjusted + row.adjusted * a.adjusted_stride;
  }
  SampleOutcome outcome{peak.argmax, 0.0f, RowStatus::kChosen, 0};
  if (!sound(raw))
    outcome.status = RowStatus::kBadLogits;
  else if (!sound(peak))
    outcome.status = RowStatus::kNothingLeft;
  else if (!row.greedy)
    outcome.token = draw_token(a, row, *reinterpret_cast<SelectShared*>(shared), logits, peak.max);
  if (threadIdx.x != 0) return;
  outcome.logprob = static_cast<float>(static_cast<double>(raw_logits[outcome.token]) - log_sum_exp(raw));
  a.outcomes[blockIdx.x] = outcome;
}

/// The num_logprobs most likely tokens of the raw logits, descending, ties by id. One block a row.
__global__ void __launch_bounds__(kSelectThreads) top_logprobs_kernel(const Sampling a) {
  FLEXCORE_SHARED(shared);
  auto& s = *reinterpret_cast<SelectShared*>(shared);
  const SampleRow& row = a.rows[blockIdx.x];
  if (row.num_logprobs == 0) return;
  const RowPeak peak = merge_peaks(a.peaks + static_cast<std::int64_t>(blockIdx.x) * a.parts, a.parts);
  if (!sound(peak)) return;
  const float* x = a.logits + blockIdx.x * a.stride;
  const unsigned highest = order_key(peak.max);
  const int wanted = row.num_logprobs, n = static_cast<int>(a.vocab_size);
  std::int32_t* ids = a.integers + row.integers * a.vocab_size;
  const Candidates c = collect_top(s, x, n, wanted, highest, ids);
  Search kth{0, c.furthest, static_cast<Weight>(wanted), 0};
  find_distance(
      s, kth, c.count, 0, [&](int i) { return x[ids[i]]; }, [&](float v) { return Entry{highest - order_key(v), 1}; });
  Cut cut{kth.base, n};
  if (kth.target < kth.weight) cut.last_id = last_of_ties(s, x, ids, c.count, highest, cut.distance, kth.target, n);

  // Exactly `wanted` are left. Distance above id: ascending keys are the wanted order.
  int size = 1;
  while (size < wanted) size *= 2;
  std::uint64_t* keys = row.sort_keys < 0 ? s.keys : a.sort_keys + row.sort_keys;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kSelectThreads) keys[i] = ~std::uint64_t{0};
  s.found_bin = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < c.count; i += kSelectThreads) {
    const std::int32_t id = ids[i];
    const unsigned distance = highest - order_key(x[id]);
    if (cut.keeps(distance, id))
      keys[atomicAdd(&s.found_bin, 1)] = std::uint64_t{distance} << 32 | static_cast<unsigned>(id);
  }
  sort_keys(keys, size);
  const double lse = log_sum_exp(peak);
  for (int i = static_cast<int>(threadIdx.x); i < wanted; i += kSelectThreads) {
    const auto id = static_cast<std::int32_t>(keys[i] & 0xffffffffu);
    a.top[row.top + i] = {id, static_cast<float>(static_cast<double>(x[id]) - lse)};
  }
}

}  // namespace flexcore::cuda
