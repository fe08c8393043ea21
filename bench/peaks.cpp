#include "peaks.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>

#include "memory/buffer.h"
#include "register_loops.h"

namespace flexcore::bench {

namespace {

constexpr std::int64_t kProbeBytes = 256 << 20;
constexpr std::int64_t kSlices = 16;      // of a worker's bytes: many short runs, the best of which nobody disturbed
constexpr std::int64_t kSteps = 1 << 15;  // of the register loops, about a tenth of a millisecond
constexpr int kLoopRepeats = 400;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Seconds of the fastest of several runs of body(worker, run) in every worker.
template <class Body>
double fastest(ThreadPool& threads, int runs, Body&& body) {
  double best = 1e30;
  for (int i = 0; i < runs; ++i) {
    const double start = now();
    threads.run([&](int worker) { body(worker, i); });
    best = std::min(best, now() - start);
  }
  return best;
}

std::uint64_t sum_words(const std::byte* data, std::int64_t bytes) {
  // Eight chains: additions must not be what it waits for.
  std::uint64_t sums[8] = {};
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  for (std::int64_t i = 0; i + 8 <= bytes / 8; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  return std::accumulate(sums, sums + 8, std::uint64_t{0});
}

}  // namespace

void Peaks::take_best(const Peaks& other) {
  for (const auto field :
       {&Peaks::read_bandwidth, &Peaks::copy_bandwidth, &Peaks::float32_flops, &Peaks::bfloat16_flops})
    this->*field = std::max(this->*field, other.*field);
}

double Peaks::memory_seconds(const cases::Cost& cost) const {
  const double both = std::min(cost.read, cost.written);
  return 2 * both / copy_bandwidth + (cost.read - both) / read_bandwidth + 2 * (cost.written - both) / copy_bandwidth;
}

double Peaks::arithmetic_seconds(const cases::Cost& cost) const {
  return cost.flops / (cost.rate == cases::Rate::kBFloat16 ? bfloat16_flops : float32_flops);
}

double Peaks::floor(const cases::Cost& cost) const { return std::max(memory_seconds(cost), arithmetic_seconds(cost)); }

Peaks measure_peaks(ThreadPool& threads) {
  MemoryLedger ledger;
  const Buffer from(host_allocator(), ledger, MemoryTag::kWorkspace, kProbeBytes);
  const Buffer to(host_allocator(), ledger, MemoryTag::kWorkspace, kProbeBytes);
  const std::int64_t slice = kProbeBytes / threads.size() / kSlices / 64 * 64, all = slice * threads.size();
  threads.run([&](int worker) {
    for (const auto* buffer : {&from, &to})
      std::memset(buffer->data() + worker * kSlices * slice, 1, static_cast<std::size_t>(kSlices * slice));
  });
  // Slices in turn, so that each comes from memory.
  const auto at = [&](int worker, int run) { return (worker * kSlices + run % kSlices) * slice; };
  std::atomic<std::uint64_t> used = 0;  // so that no loop is dropped
  Peaks peaks;
  peaks.read_bandwidth = static_cast<double>(all) / fastest(threads, 4 * kSlices, [&](int worker, int run) {
                           used += sum_words(from.data() + at(worker, run), slice);
                         });
  peaks.copy_bandwidth =
      2 * static_cast<double>(all) / fastest(threads, 4 * kSlices, [&](int worker, int run) {
        std::memcpy(to.data() + at(worker, run), from.data() + at(worker, run), static_cast<std::size_t>(slice));
      });
  const auto rate = [&](const RegisterLoop& loop) {
    const double seconds = fastest(threads, kLoopRepeats, [&](int, int) { loop.run(kSteps); });
    return static_cast<double>(threads.size() * kSteps) * loop.flops_per_step / seconds;
  };
  peaks.float32_flops = rate(float32_loop());
  peaks.bfloat16_flops = std::max(peaks.float32_flops, rate(bfloat16_loop()));
  return peaks;
}

}  // namespace flexcore::bench
