#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace flexcore {

/// A fixed team of threads that run one function together. The caller is worker 0. Workers spin for a short
/// while after each run, so that the many small regions of a decode step cost about a microsecond each, and sleep
/// after. One thread at a time may call into a pool. An exception in a worker is re-thrown to the caller.
class ThreadPool {
 public:
  /// `num_threads` 0: the number of cores this process may use. Throws DeviceError when the system gives fewer threads.
  explicit ThreadPool(int num_threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;
  /// The size of a pool made with `num_threads`.
  static int size_for(int num_threads);

  /// body(worker) once for every worker number in [0, size()). Each number has one thread at a time, but a thread may
  /// take several.
  template <class Body>
  void run(Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_raw([](void* data, int worker) { (*static_cast<Plain*>(data))(worker); },
            const_cast<void*>(static_cast<const void*>(std::addressof(body))));
  }

  /// body(begin, end, worker) over [0, count) in equal contiguous parts of at least `grain`, one part a worker.
  /// Which rows share a part never changes a result: kernels reduce within a row.
  template <class Body>
  void parallel_for(std::int64_t count, std::int64_t grain, Body&& body) {
    if (count <= 0) return;
    const std::int64_t parts = parts_for(count, grain);
    if (parts == 1) {
      body(std::int64_t{0}, count, 0);
      return;
    }
    run([&](int worker) {
      if (worker >= parts) return;
      const std::int64_t begin = count * worker / parts, end = count * (worker + 1) / parts;
      if (begin < end) body(begin, end, worker);
    });
  }

  /// body(index, worker) for every index of [0, count), handed out one at a time: for items of uneven cost.
  template <class Body>
  void parallel_for_each(std::int64_t count, Body&& body) {
    if (count <= 0) return;
    if (count == 1 || size() == 1) {
      for (std::int64_t i = 0; i < count; ++i) body(i, 0);
      return;
    }
    reset_counter();
    run([&](int worker) {
      for (std::int64_t i = next(); i < count; i = next()) body(i, worker);
    });
  }

 private:
  void run_raw(void (*body)(void*, int), void* data);
  std::int64_t parts_for(std::int64_t count, std::int64_t grain) const;
  void reset_counter();
  std::int64_t next();

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flexcore
