#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

/// Runs CUDA kernels on the host, thread by thread: blocks one after the other, the threads of a block as fibers that
/// change at barriers and warp collectives. Built to find mistakes, not to be fast: shared memory is exactly as large
/// as asked for and starts poisoned, threads can run in any order, and a barrier that some thread never reaches, or
/// where threads meet from different lines, is an error that says where they wait.
namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr std::size_t count() const { return std::size_t{x} * y * z; }
};

/// Order in which the threads of a block run between two barriers, and the blocks of a grid. SIMT_ORDER in the
/// environment (forward, reverse, shuffled) is the one to begin with.
enum class Order : std::uint8_t { kForward, kReverse, kShuffled };
Order order();
void set_order(Order order, std::uint64_t seed = 0);

/// Runs `body` once for every thread of the grid. Throws std::runtime_error for a deadlock and for what a device would
/// refuse (more than 1,024 threads or 227 KiB of shared memory).
void launch(Dim3 grid, Dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

// What a thread sees.
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_dim();
const Dim3& grid_dim();
unsigned char* shared_memory();
void sync_block(const std::source_location& where);

inline constexpr int kWarp = 32;
inline constexpr std::size_t kSlotBytes = 64;  // what one lane may publish at once

/// All lanes of `mask` meet; each leaves `bytes` for the others. `what` names the operation: lanes that meet in
/// different ones are an error.
void meet(std::uint32_t mask, const char* what, const void* data, std::size_t bytes);
/// What a lane left at the last meeting.
const void* left_by(int lane);
int lane();

/// A thread's copy to shared memory (zeros where not `valid`) that takes place at the wait that covers its group; until
/// then the destination is poisoned. Throws where source or destination is not aligned to `bytes`.
void copy_later(void* to, const void* from, std::size_t bytes, bool valid);
void commit_copies();
/// Waits for all of the thread's groups but the last `left`.
void wait_copies(std::size_t left);
void require_aligned(const void* address, std::size_t bytes, const char* what);

template <class T>
T exchange(std::uint32_t mask, const char* what, T value, int from) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kSlotBytes);
  meet(mask, what, &value, sizeof(T));
  T result = value;
  if (from >= 0 && from < kWarp && (mask >> from & 1u) != 0) std::memcpy(&result, left_by(from), sizeof(T));
  return result;
}

}  // namespace simt
