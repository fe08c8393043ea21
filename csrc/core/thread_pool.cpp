#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"

namespace flexcore {

namespace {

// Longer than the gaps between the regions of one step, far shorter than a time slice.
constexpr int kSpins = 20000;

int usable_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

struct ThreadPool::State {
  // Generation of the run in the upper bits, its next unclaimed part in the lower ones. Whoever claims a part runs it,
  // so a worker that the system keeps off its core delays nobody: the others take its part.
  static constexpr int kPartBits = 16;
  alignas(64) std::atomic<std::uint64_t> ticket{0};
  alignas(64) std::atomic<int> pending{0};
  alignas(64) std::atomic<std::int64_t> counter{0};
  std::vector<std::thread> threads;
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::uint64_t num_parts = 0;  // of the pool, fixed
  void (*body)(void*, int) = nullptr;
  void* data = nullptr;
  std::mutex mutex;
  std::condition_variable wake;
  std::exception_ptr error;

  ~State() {
    {
      const std::lock_guard lock(mutex);
      stop.store(true);
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
  }

  bool has_part(std::uint64_t value) const { return (value & ((1u << kPartBits) - 1)) < num_parts; }

  // Runs parts until none is left. `body` and `data` stay as they are while a claimed part is pending.
  void work() {
    auto value = ticket.load(std::memory_order_acquire);
    while (has_part(value)) {
      if (!ticket.compare_exchange_weak(value, value + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      try {
        body(data, static_cast<int>(value & ((1u << kPartBits) - 1)));
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
      pending.fetch_sub(1, std::memory_order_acq_rel);
      value = ticket.load(std::memory_order_acquire);
    }
  }

  void loop() {
    while (!stop.load(std::memory_order_acquire)) {
      for (int spins = 0; spins < kSpins && !has_part(ticket.load(std::memory_order_acquire)); ++spins) relax();
      if (!has_part(ticket.load(std::memory_order_acquire))) {
        std::unique_lock lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return stop.load() || has_part(ticket.load()); });
        sleepers.fetch_sub(1);
      }
      work();
    }
  }

  // Publishes body and data. The lock pairs with a worker between its test and its wait.
  void publish() {
    const std::uint64_t generation = ticket.load(std::memory_order_relaxed) >> kPartBits;
    ticket.store((generation + 1) << kPartBits, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard lock(mutex);
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  const int count = size_for(num_threads);
  state_->num_parts = static_cast<std::uint64_t>(count);
  state_->ticket.store(state_->num_parts);  // nothing to claim yet
  state_->threads.reserve(static_cast<std::size_t>(count - 1));
  try {
    for (int worker = 1; worker < count; ++worker) state_->threads.emplace_back([s = state_.get()] { s->loop(); });
  } catch (const std::system_error& error) {
    throw DeviceError(str("num_threads: ", count, ", but the system gave ", size(), ": ", error.what()));
  }
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::size_for(int num_threads) {
  require(num_threads >= 0 && num_threads <= 1024, "num_threads: ", num_threads, ", wanted 0 (all cores) to 1024");
  return num_threads == 0 ? usable_cores() : num_threads;
}

int ThreadPool::size() const { return static_cast<int>(state_->threads.size()) + 1; }

void ThreadPool::run_raw(void (*body)(void*, int), void* data) {
  State& s = *state_;
  if (s.threads.empty()) {
    body(data, 0);
    return;
  }
  s.body = body;
  s.data = data;
  s.pending.store(static_cast<int>(s.num_parts), std::memory_order_relaxed);
  s.publish();
  s.work();
  for (int spins = 0; s.pending.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins / 10)
      relax();
    else
      std::this_thread::yield();
  }
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

std::int64_t ThreadPool::parts_for(std::int64_t count, std::int64_t grain) const {
  return std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, size());
}

void ThreadPool::reset_counter() { state_->counter.store(0, std::memory_order_relaxed); }

std::int64_t ThreadPool::next() { return state_->counter.fetch_add(1, std::memory_order_relaxed); }

}  // namespace flexcore
