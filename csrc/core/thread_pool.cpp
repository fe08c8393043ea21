#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
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
  std::vector<std::thread> threads;
  alignas(64) std::atomic<std::uint64_t> generation{0};
  alignas(64) std::atomic<int> pending{0};
  alignas(64) std::atomic<std::int64_t> counter{0};
  std::atomic<int> sleepers{0};
  void (*body)(void*, int) = nullptr;
  void* data = nullptr;
  bool stop = false;
  std::mutex mutex;
  std::condition_variable wake;
  std::exception_ptr error;

  void call(int worker) {
    try {
      body(data, worker);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  }

  void loop(int worker) {
    std::uint64_t seen = 0;
    while (true) {
      int spins = 0;
      while (generation.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          relax();
          continue;
        }
        std::unique_lock lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return generation.load(std::memory_order_seq_cst) != seen; });
        sleepers.fetch_sub(1);
      }
      seen = generation.load(std::memory_order_acquire);
      if (stop) return;
      call(worker);
      pending.fetch_sub(1, std::memory_order_release);
    }
  }

  // Publishes what was written before; the lock pairs with a worker between its test and its wait.
  void advance() {
    generation.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) {
      const std::lock_guard lock(mutex);
      wake.notify_all();
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  require(num_threads >= 0 && num_threads <= 1024, "num_threads: ", num_threads, ", wanted 0 (all cores) to 1024");
  const int count = num_threads == 0 ? usable_cores() : num_threads;
  for (int worker = 1; worker < count; ++worker)
    state_->threads.emplace_back([s = state_.get(), worker] { s->loop(worker); });
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
    state_->generation.fetch_add(1);
  }
  state_->wake.notify_all();
  for (auto& thread : state_->threads) thread.join();
}

int ThreadPool::size() const { return static_cast<int>(state_->threads.size()) + 1; }

void ThreadPool::run_raw(void (*body)(void*, int), void* data) {
  State& s = *state_;
  s.body = body;
  s.data = data;
  if (s.threads.empty()) {
    body(data, 0);
    return;
  }
  s.pending.store(static_cast<int>(s.threads.size()), std::memory_order_relaxed);
  s.advance();
  s.call(0);
  for (int spins = 0; s.pending.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins)
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
