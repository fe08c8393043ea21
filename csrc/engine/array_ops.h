#pragma once

#include "backends/register.h"
#include "core/thread_pool.h"
#include "flexcore/ops.h"
#include "memory/arena.h"
#include "ops/require.h"

/// What the files of flexcore/ops.h share: the runtime, and checks of what an argument struct can no longer see.
namespace flexcore::ops {

struct Runtime::Impl {
  Impl(int num_threads, Device where) : device(open_device(where)), registry(make_op_registry()), threads(num_threads) {
    context.registry = &registry;
    context.device = where;
    context.threads = &threads;
    context.scratch = &scratch;
    context.stream = device->stream();
  }
  std::unique_ptr<DeviceRuntime> device;
  OpRegistry registry;
  MemoryLedger ledger;
  Arena scratch{device->allocator(), ledger};
  ThreadPool threads;
  OpContext context;
};

template <class Args>
void run_op(Runtime& runtime, const Args& args) {
  run(runtime.impl().context, args);
}

/// A default TensorView is an argument that was left out; an array without elements is not.
inline bool given(const TensorView& t) { return t.ndim() > 0; }

inline void require_like(std::string_view op, std::string_view name, const TensorView& t, std::string_view other_name,
                         const TensorView& other) {
  bool same = t.ndim() == other.ndim();
  for (int i = 0; same && i < t.ndim(); ++i) same = t.shape(i) == other.shape(i);
  require(same, op, ": ", name, " is ", t, ", wanted the shape of ", other_name, ", ", other);
}

/// An array of the caller's as a weight in no packed layout.
WeightView plain_weight(std::string_view op, const TensorView& weight);

/// int32 offsets [num_segments + 1] that rise from 0 to num_tokens. Returns them.
std::span<const std::int32_t> require_indptr(std::string_view op, const TensorView& indptr, std::int64_t num_tokens);

}  // namespace flexcore::ops
