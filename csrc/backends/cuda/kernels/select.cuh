#pragma once

#include "backends/cuda/kernels/device.cuh"

// What choosing from a row of logits is made of, each a function of a whole block of kSelectThreads: the k-th of many
// numbers by their digits, the ones above a bound in order, and the point on a line of weights. All results are the
// same at every run: sums are of integers, or in a fixed order.

namespace flexcore::cuda {

inline constexpr int kSelectThreads = 1024, kSelectWarps = kSelectThreads / kWarpSize;
inline constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kBinsOfThread = kBins / kSelectThreads;
/// Weights on a line are first added up in so many segments, of a multiple of kSegmentLength each.
inline constexpr int kSegments = 1024, kSegmentLength = 512;
/// Loads of one thread that are under way together.
inline constexpr int kInFlight = 8;

using Weight = unsigned long long;

struct SelectShared {
  // A bin is 64 bits in halves, as shared memory adds 32 at once. Sorted keys lie here too.
  union {
    struct {
      unsigned low[kBins], high[kBins];
    } bins;
    std::uint64_t keys[kBins];
  };
  double sums[kSegments];
  float maxima[kSelectThreads];
  float slots[2 * kWarpSize];
  Weight warp_totals[kSelectWarps];
  int counts[2][kSelectWarps];
  // What one thread found, for all.
  Weight found_before, found_weight;
  int found_at;
  int found_bin;
};

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarpSize; }

/// Unsigned numbers in the order of the floats; both zeros are one. NaN is not thought of.
__device__ __forceinline__ unsigned order_key(float x) {
  const unsigned bits = x == 0.0f ? 0u : __float_as_uint(x);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(unsigned key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

/// Sum over the lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_prefix_sum(T x) {
  FLEXCORE_UNROLL
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_of_thread() >= distance) x += other;
  }
  return x;
}

/// f(i) for i in [0, n), kInFlight of them with their loads together. `load(i)` fetches what `f(i, value)` works on.
template <class Load, class F>
__device__ __forceinline__ void over_items(int n, Load&& load, F&& f) {
  for (int first = static_cast<int>(threadIdx.x); first < n; first += kInFlight * kSelectThreads) {
    decltype(load(first)) values[kInFlight];
    FLEXCORE_UNROLL
    for (int j = 0; j < kInFlight; ++j)
      values[j] = first + j * kSelectThreads < n ? load(first + j * kSelectThreads) : decltype(load(first)){};
    FLEXCORE_UNROLL
    for (int j = 0; j < kInFlight; ++j)
      if (first + j * kSelectThreads < n) f(first + j * kSelectThreads, values[j]);
  }
}

/// Weights of items by their digit: bins of `1 << shift` distances from `base` on. Leaves in every bin the sum of the
/// bins up to it and returns that of all. `entry(value)` gives an item's {distance, weight}; items beyond the bins are
/// left out.
struct Entry {
  unsigned distance;
  Weight weight;
};

template <class Load, class ToEntry>
__device__ Weight sum_bins(SelectShared& s, int n, unsigned base, unsigned range, int shift, Load&& load,
                           ToEntry&& entry) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) s.bins.low[i] = s.bins.high[i] = 0;
  __syncthreads();
  over_items(n, load, [&](int, auto value) {
    const Entry e = entry(value);
    if (e.weight == 0 || e.distance - base > range) return;
    const unsigned bin = (e.distance - base) >> shift, low = static_cast<unsigned>(e.weight);
    // Carries depend on the order, their number does not.
    const unsigned old = atomicAdd(&s.bins.low[bin], low);
    const unsigned high = static_cast<unsigned>(e.weight >> 32) + (old + low < old ? 1u : 0u);
    if (high != 0) atomicAdd(&s.bins.high[bin], high);
  });
  __syncthreads();
  Weight sums[kBinsOfThread], sum = 0;
  const int first = static_cast<int>(threadIdx.x) * kBinsOfThread;
  FLEXCORE_UNROLL
  for (int i = 0; i < kBinsOfThread; ++i) sums[i] = sum += Weight{s.bins.high[first + i]} << 32 | s.bins.low[first + i];
  const Weight upto = warp_prefix_sum(sum);
  if (lane_of_thread() == kWarpSize - 1) s.warp_totals[warp_of_thread()] = upto;
  __syncthreads();
  const Weight warps = warp_prefix_sum(s.warp_totals[lane_of_thread()]);
  const Weight others = __shfl_sync(kAllLanes, warps, (warp_of_thread() + kWarpSize - 1) % kWarpSize);
  const Weight before = upto - sum + (warp_of_thread() > 0 ? others : Weight{0});
  FLEXCORE_UNROLL
  for (int i = 0; i < kBinsOfThread; ++i) {
    s.bins.low[first + i] = static_cast<unsigned>(before + sums[i]);
    s.bins.high[first + i] = static_cast<unsigned>((before + sums[i]) >> 32);
  }
  __syncthreads();
  return __shfl_sync(kAllLanes, warps, kSelectWarps - 1);
}

/// Sets found_bin to the first bin up to which `target` is reached; found_before: the sum of those before it,
/// found_weight: its own. `target` is in [1, sum of all].
__device__ __forceinline__ void find_bin(SelectShared& s, Weight target) {
  const auto upto = [&](int bin) { return bin < 0 ? Weight{0} : Weight{s.bins.high[bin]} << 32 | s.bins.low[bin]; };
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kSelectThreads) {
    const Weight before = upto(bin - 1), here = upto(bin);
    if (before < target && target <= here) {
      s.found_bin = bin;
      s.found_before = before;
      s.found_weight = here - before;
    }
  }
  __syncthreads();
}

/// The nearest distance up to which items weigh `target`. When done, `base` is that distance, `target` what is wanted
/// of the items at it, and `weight` what they have.
struct Search {
  unsigned base, range;  // it is in [base, base + range]
  Weight target, weight;
};

/// `part` in (0, 1] of the weight of all items in the range, instead of search.target, unless it is 0.
template <class Load, class ToEntry>
__device__ void find_distance(SelectShared& s, Search& search, int n, double part, Load&& load, ToEntry&& entry) {
  int shift;
  do {
    const int bits = kWarpSize - __clz(static_cast<int>(search.range));
    shift = bits > kDigitBits ? bits - kDigitBits : 0;
    const Weight total = sum_bins(s, n, search.base, search.range, shift, load, entry);
    if (part != 0) {
      search.target = static_cast<Weight>(ceil(part * static_cast<double>(total)));
      part = 0;
    }
    search.target = search.target > total ? total : search.target;
    search.target = search.target == 0 ? 1 : search.target;
    find_bin(s, search.target);
    search.base += static_cast<unsigned>(s.found_bin) << shift;
    search.range = (1u << shift) - 1u;
    search.target -= s.found_before;
    search.weight = s.found_weight;
  } while (shift > 0);
}

/// Writes, ascending, the i in [0, n) for which keep(x[i]); returns how many.
template <class Keep>
__device__ int collect(SelectShared& s, const float* x, int n, std::int32_t* ids, Keep&& keep) {
  constexpr int kTile = kInFlight * kSelectThreads;
  int count = 0;
  int turn = 0;
  for (int tile = 0; tile < n; tile += kTile, turn ^= 1) {
    const int first = tile + warp_of_thread() * (kInFlight * kWarpSize) + lane_of_thread();
    float values[kInFlight];
    FLEXCORE_UNROLL
    for (int j = 0; j < kInFlight; ++j) values[j] = first + j * kWarpSize < n ? x[first + j * kWarpSize] : 0.0f;
    unsigned kept[kInFlight];
    int mine = 0;
    FLEXCORE_UNROLL
    for (int j = 0; j < kInFlight; ++j) {
      kept[j] = __ballot_sync(kAllLanes, first + j * kWarpSize < n && keep(values[j]));
      mine += __popc(kept[j]);
    }
    // Two rows of counts, so that one barrier a tile is enough.
    if (lane_of_thread() == 0) s.counts[turn][warp_of_thread()] = mine;
    __syncthreads();
    const int upto = warp_prefix_sum(s.counts[turn][lane_of_thread()]);
    int at = count + __shfl_sync(kAllLanes, upto, warp_of_thread()) - mine;
    FLEXCORE_UNROLL
    for (int j = 0; j < kInFlight; ++j) {
      if ((kept[j] >> lane_of_thread() & 1u) != 0)
        ids[at + __popc(kept[j] & ((1u << lane_of_thread()) - 1u))] = first + j * kWarpSize;
      at += __popc(kept[j]);
    }
    count += __shfl_sync(kAllLanes, upto, kSelectWarps - 1);
  }
  __syncthreads();  // others' ids
  return count;
}

/// One warp: the first i in [begin, end) at which the running sum of value(i) exceeds `left`, else the last i with a
/// value above 0, else -1. `left` is less what lies before it, or beyond everything.
template <class Value>
__device__ int find_beyond(int begin, int end, double& left, Value&& value) {
  int last = -1;
  for (int first = begin; first < end; first += kWarpSize) {
    const int i = first + lane_of_thread();
    const double x = i < end ? value(i) : 0.0, upto = warp_prefix_sum(x);
    const double before = __shfl_up_sync(kAllLanes, upto, 1u);
    const unsigned beyond = __ballot_sync(kAllLanes, x > 0 && left < upto), some = __ballot_sync(kAllLanes, x > 0);
    if (beyond != 0) {
      const int lane = __ffs(static_cast<int>(beyond)) - 1;
      left -= lane > 0 ? __shfl_sync(kAllLanes, before, lane) : 0.0;
      return first + lane;
    }
    if (some != 0) last = first + kWarpSize - 1 - __clz(static_cast<int>(some));
    left -= __shfl_sync(kAllLanes, upto, kWarpSize - 1);
  }
  left = 1e300;  // rounding has left the point beyond the last item
  return last;
}

/// The i in [0, n) at which the running sum of value(i) first exceeds `point` times the whole sum.
template <class Value>
__device__ int pick(SelectShared& s, int n, double point, Value&& value) {
  const int length = (n + kSegments * kSegmentLength - 1) / (kSegments * kSegmentLength) * kSegmentLength;
  const int segments = (n + length - 1) / length;
  const auto end_of = [&](int segment) { return segment * length + length < n ? segment * length + length : n; };
  for (int segment = warp_of_thread(); segment < segments; segment += kSelectWarps) {
    double sum = 0;
    FLEXCORE_UNROLL_4
    for (int i = segment * length + lane_of_thread(); i < end_of(segment); i += kWarpSize) sum += value(i);
    sum = warp_sum(sum);
    if (lane_of_thread() == 0) s.sums[segment] = sum;
  }
  __syncthreads();
  if (warp_of_thread() == 0) {
    double left = 0;
    for (int segment = lane_of_thread(); segment < segments; segment += kWarpSize) left += s.sums[segment];
    left = point * warp_sum(left);
    const int segment = find_beyond(0, segments, left, [&](int i) { return s.sums[i]; });
    const int at = find_beyond(segment * length, end_of(segment), left, value);
    if (lane_of_thread() == 0) s.found_at = at;
  }
  __syncthreads();
  return s.found_at;
}

/// Sorts `size` keys, a power of two, ascending; shared or global memory.
__device__ __forceinline__ void sort_keys(std::uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2)
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += kSelectThreads) {
        const int inside = i & (distance - 1), low = 2 * i - inside, high = low + distance;
        const std::uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  __syncthreads();
}

}  // namespace flexcore::cuda
