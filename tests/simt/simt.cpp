#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kMaxThreads = 1024, kMaxShared = 227 << 10;

// A stack of its own and a place to go on from.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
};

#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
// Saves what a call must keep, changes the stack, and returns on the other one.
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

class Stack {
 public:
  Stack() : base_(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (base_ == MAP_FAILED) throw std::runtime_error("simt: no memory for a thread's stack");
    mprotect(base_, 4096, PROT_NONE);  // overflow faults instead of reaching a neighbour
  }
  ~Stack() { munmap(base_, kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  void* base() const { return base_; }
  void* top() const { return static_cast<char*>(base_) + kStackBytes; }

  bool abandoned = false;  // in the middle of a kernel that failed

 private:
  void* base_;
};

enum class Wait : std::uint8_t { kNothing, kBlock, kWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  bool valid;
  std::uint64_t group;
};

struct Thread {
  Context context;
  Dim3 index;
  std::size_t number = 0;
  Wait wait = Wait::kNothing;
  std::uint32_t mask = 0;      // of the meeting that it waits for
  const char* what = nullptr;  // and its name
  std::source_location where;  // of the barrier that it waits at
  std::uint64_t meetings = 0;
  const unsigned char* left = nullptr;  // what it brought to the last meeting that took place
  void* fake_stack = nullptr;           // the sanitizer's
  std::vector<Copy> copies;             // that no wait has covered yet
  std::uint64_t groups = 0;             // of copies, closed
};

// Slots for two meetings: between two releases every thread runs once, so what a lane brings to the next one must not
// overwrite what slower lanes have yet to read.
struct Warp {
  alignas(16) std::array<std::array<std::array<unsigned char, kSlotBytes>, kWarp>, 2> slots;
};

struct Block {
  Dim3 grid_dim, block_dim, index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  Thread* current = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_size = 0;
#endif
};

thread_local Block* block_now = nullptr;
thread_local std::vector<std::unique_ptr<Stack>> stacks;
thread_local std::optional<Order> order_chosen;
thread_local std::mt19937_64 order_random;

Block& block() {
  if (block_now == nullptr) throw std::logic_error("simt: a device function was called outside a kernel");
  return *block_now;
}

void to_scheduler(bool done) {
  Block& b = *block_now;
  Thread& self = *b.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &self.fake_stack, b.scheduler_stack, b.scheduler_stack_size);
#else
  (void)done;
#endif
  switch_context(self.context, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
}

void thread_main() {
  Block& b = *block_now;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
  try {
    (*b.body)();
  } catch (...) {
    if (!b.error) b.error = std::current_exception();
  }
  b.current->wait = Wait::kDone;
  to_scheduler(true);
}

void prepare(Thread& thread, Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  // The last user never returned from its first frame; after a failure, from none.
  const std::size_t used = stack.abandoned ? kStackBytes - 4096 : 4096;
  __asan_unpoison_memory_region(static_cast<char*>(stack.top()) - used, used);
  stack.abandoned = false;
#endif
#if defined(__x86_64__)
  // As simt_switch leaves it: six registers, then the address to return to. The stack is 16-byte aligned before a call.
  auto** top = static_cast<void**>(stack.top()) - 2;
  *top = reinterpret_cast<void*>(&thread_main);
  top[1] = nullptr;
  thread.context.stack_pointer = top - 6;
  std::fill(top - 6, top, nullptr);
#else
  getcontext(&thread.context.context);
  thread.context.context.uc_stack.ss_sp = stack.base();
  thread.context.context.uc_stack.ss_size = kStackBytes;
  thread.context.context.uc_link = nullptr;
  makecontext(&thread.context.context, thread_main, 0);
#endif
}

void run_thread(Block& b, Thread& thread, [[maybe_unused]] const Stack& stack) {
  b.current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.scheduler_fake_stack, stack.base(), kStackBytes);
#endif
  switch_context(b.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.scheduler_fake_stack, nullptr, nullptr);
#endif
}

std::string barrier(const Thread& t) {
  const std::string_view path = t.where.file_name();
  return "__syncthreads at " + std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(t.where.line());
}

std::string describe(const Block& b) {
  std::string text, last;
  for (const Thread& t : b.threads) {
    const std::string at = t.wait == Wait::kDone ? "done" : t.wait == Wait::kBlock ? barrier(t) : t.what;
    if (at != last) text += (text.empty() ? "" : ", ") + ("from thread " + std::to_string(t.number)) + ": " + at;
    last = at;
  }
  return text;
}

// Lets a warp's meeting begin when every lane of the mask is there.
bool release_warp(Block& b, std::size_t first) {
  bool released = false;
  const std::size_t end = std::min(first + kWarp, b.threads.size());
  for (std::size_t i = first; i < end; ++i) {
    const Thread& t = b.threads[i];
    if (t.wait != Wait::kWarp) continue;
    bool all = true;
    for (std::size_t lane = 0; lane < kWarp && all; ++lane) {
      if ((t.mask >> lane & 1u) == 0) continue;
      if (first + lane >= end)
        throw std::runtime_error(std::string("simt: ") + t.what + " waits for a lane that is not there");
      const Thread& other = b.threads[first + lane];
      if (other.wait == Wait::kDone)
        throw std::runtime_error(std::string("simt: ") + t.what + " waits for a lane that has returned");
      all = other.wait == Wait::kWarp;
      if (all && (other.mask != t.mask || (other.what != t.what && std::strcmp(other.what, t.what) != 0)))
        throw std::runtime_error(std::string("simt: lanes meet in ") + t.what + " and in " + other.what +
                                 ", or with other masks");
    }
    if (!all) continue;
    const std::uint32_t mask = t.mask;
    for (std::size_t lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1u) == 0) continue;
      Thread& member = b.threads[first + lane];
      member.wait = Wait::kNothing;
      member.left = b.warps[first / kWarp].slots[(member.meetings + 1) % 2][lane].data();
    }
    released = true;
  }
  return released;
}

void run_block(Block& b) {
  std::vector<std::size_t> turn(b.threads.size());
  for (std::size_t i = 0; i < turn.size(); ++i) turn[i] = order() == Order::kReverse ? turn.size() - 1 - i : i;
  if (order() == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), order_random);
  std::size_t left = b.threads.size();
  while (left > 0) {
    bool ran = false;
    for (const auto i : turn) {
      Thread& t = b.threads[i];
      if (t.wait != Wait::kNothing) continue;
      run_thread(b, t, *stacks[i]);
      ran = true;
      if (b.error) std::rethrow_exception(b.error);
      if (t.wait == Wait::kDone) --left;
    }
    for (std::size_t first = 0; first < b.threads.size(); first += kWarp) ran |= release_warp(b, first);
    if (ran) continue;
    // As on the device since Volta, threads that have returned are not waited for.
    const bool all = std::all_of(b.threads.begin(), b.threads.end(),
                                 [](const Thread& t) { return t.wait == Wait::kBlock || t.wait == Wait::kDone; });
    if (!all) throw std::runtime_error("simt: deadlock; " + describe(b));
    const Thread* first = nullptr;
    for (const Thread& t : b.threads) {
      if (t.wait != Wait::kBlock) continue;
      if (first == nullptr) first = &t;
      if (t.where.line() != first->where.line() || (t.where.file_name() != first->where.file_name() &&
                                                    std::strcmp(t.where.file_name(), first->where.file_name()) != 0))
        throw std::runtime_error("simt: a barrier in two places; " + describe(b));
    }
    for (Thread& t : b.threads)
      if (t.wait == Wait::kBlock) t.wait = Wait::kNothing;
  }
}

}  // namespace

Order order() {
  if (order_chosen) return *order_chosen;
  const char* wanted = std::getenv("SIMT_ORDER");
  const std::string_view name(wanted == nullptr ? "forward" : wanted);
  if (name != "forward" && name != "reverse" && name != "shuffled")
    throw std::runtime_error("simt: SIMT_ORDER is forward, reverse or shuffled");
  order_chosen = name == "reverse" ? Order::kReverse : name == "shuffled" ? Order::kShuffled : Order::kForward;
  return *order_chosen;
}

void set_order(Order order, std::uint64_t seed) {
  order_chosen = order;
  order_random.seed(seed);
}

void launch(Dim3 grid, Dim3 block_dim, std::size_t shared_bytes, const std::function<void()>& body) {
  if (block_now != nullptr) throw std::logic_error("simt: launch inside a kernel");
  if (block_dim.count() == 0 || block_dim.count() > kMaxThreads || grid.count() == 0 || grid.y > 65535 ||
      grid.z > 65535)
    throw std::runtime_error("simt: bad launch of " + std::to_string(grid.count()) + " blocks of " +
                             std::to_string(block_dim.count()) + " threads");
  if (shared_bytes > kMaxShared)
    throw std::runtime_error("simt: " + std::to_string(shared_bytes) + " bytes of shared memory");
  while (stacks.size() < block_dim.count()) stacks.push_back(std::make_unique<Stack>());
  std::vector<std::size_t> blocks(grid.count());
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = order() == Order::kReverse ? blocks.size() - 1 - i : i;
  if (order() == Order::kShuffled) std::shuffle(blocks.begin(), blocks.end(), order_random);
  for (const auto which : blocks) {
    Block b;
    b.grid_dim = grid;
    b.block_dim = block_dim;
    b.index = Dim3(static_cast<unsigned>(which % grid.x), static_cast<unsigned>(which / grid.x % grid.y),
                   static_cast<unsigned>(which / grid.x / grid.y));
    b.body = &body;
    b.threads.resize(block_dim.count());
    b.warps.resize((block_dim.count() + kWarp - 1) / kWarp);
    // Its own allocation, so that a sanitizer sees an access beyond it. 0xff bytes are NaN in every float format.
    b.shared.reset(new unsigned char[shared_bytes]);
    std::memset(b.shared.get(), 0xff, shared_bytes);
    for (std::size_t i = 0; i < b.threads.size(); ++i) {
      b.threads[i].number = i;
      b.threads[i].index =
          Dim3(static_cast<unsigned>(i % block_dim.x), static_cast<unsigned>(i / block_dim.x % block_dim.y),
               static_cast<unsigned>(i / block_dim.x / block_dim.y));
      prepare(b.threads[i], *stacks[i]);
    }
    block_now = &b;
    try {
      run_block(b);
    } catch (...) {
      block_now = nullptr;
      for (std::size_t i = 0; i < b.threads.size(); ++i) stacks[i]->abandoned = true;
      throw;
    }
    block_now = nullptr;
  }
}

const Dim3& thread_index() { return block().current->index; }
const Dim3& block_index() { return block().index; }
const Dim3& block_dim() { return block().block_dim; }
const Dim3& grid_dim() { return block().grid_dim; }
unsigned char* shared_memory() { return block().shared.get(); }

void sync_block(const std::source_location& where) {
  block().current->wait = Wait::kBlock;
  block_now->current->where = where;
  to_scheduler(false);
}

int lane() { return static_cast<int>(block().current->number % kWarp); }

void meet(std::uint32_t mask, const char* what, const void* data, std::size_t bytes) {
  Thread& self = *block().current;
  const std::size_t at = self.number;
  if ((mask >> (at % kWarp) & 1u) == 0)
    throw std::runtime_error(std::string("simt: ") + what + " by a lane that is not in its mask");
  Warp& warp = block_now->warps[at / kWarp];
  if (bytes > 0) std::memcpy(warp.slots[self.meetings % 2][at % kWarp].data(), data, bytes);
  ++self.meetings;
  self.mask = mask;
  self.what = what;
  self.wait = Wait::kWarp;
  to_scheduler(false);
}

void require_aligned(const void* address, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    throw std::runtime_error(std::string("simt: ") + what + " of an address that is not aligned to " +
                             std::to_string(bytes));
}

void copy_later(void* to, const void* from, std::size_t bytes, bool valid) {
  require_aligned(to, bytes, "cp.async");
  require_aligned(from, bytes, "cp.async");
  Thread& self = *block().current;
  std::memset(to, 0xff, bytes);
  self.copies.push_back({to, from, bytes, valid, self.groups});
}

void commit_copies() { ++block().current->groups; }

void wait_copies(std::size_t left) {
  Thread& self = *block().current;
  std::erase_if(self.copies, [&](const Copy& c) {
    if (c.group + left >= self.groups) return false;
    if (c.valid)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
    return true;
  });
}

const void* left_by(int lane) {
  const std::size_t first = block().current->number / kWarp * kWarp;
  return block_now->threads[first + static_cast<std::size_t>(lane)].left;
}

}  // namespace simt
