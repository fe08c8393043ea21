#pragma once

#include "core/thread_pool.h"
#include "memory/arena.h"

namespace flexcore {

class OpRegistry;

/// What an op runs with. An argument everywhere, so that two engines in one process never meet.
struct OpContext {
  const OpRegistry* registry = nullptr;
  Device device;
  ThreadPool* threads = nullptr;  // CPU work
  Arena* scratch = nullptr;       // temporary memory on `device`
  void* stream = nullptr;         // backend's own; null on the CPU
  /// Identity of the batch that spans describe: while it stays the same, kernels may keep what they derive from them,
  /// in scratch that the caller holds a scope of. 0: every call stands alone.
  std::uint64_t batch = 0;
};

/// Whether a result replaces what is in the output or is added to it.
enum class GradMode : std::uint8_t { kWrite, kAccumulate };

}  // namespace flexcore
