#pragma once

#include <algorithm>
#include <cstdint>

#include "flexcore/tensor.h"

namespace flexcore {

/// The largest steps of a model, in which each op's scratch is largest.
struct ScratchShape {
  std::int64_t rows = 0, sampled_rows = 0, positions = 0, block_size = 1;
  std::int64_t hidden_size = 0, intermediate_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, vocab_size = 0;
  std::int64_t rank = 0;  // of the adapters
  std::int64_t num_threads = 1;
  bool quantized = false;  // the linears of the layers

  /// Features of the widest input, and of the widest outputs that share one: q, k, v or gate, up.
  std::int64_t widest_input() const { return std::max({hidden_size, intermediate_size, num_heads * head_dim}); }
  std::int64_t widest_outputs() const {
    return std::max({hidden_size, 2 * intermediate_size, (num_heads + 2 * num_kv_heads) * head_dim});
  }
};

/// Bytes that no op of such a step exceeds, provided that the weights are packed and that a backward unit has one
/// adapter. Each family's part is beside its launchers, from the same constants.
struct ScratchBytes {
  std::int64_t forward = 0;   // of everything, where `backward` is 0
  std::int64_t backward = 0;  // beside it, on a device's second stream
};
ScratchBytes scratch_bytes(Device device, const ScratchShape& shape);

/// What only some backends have is in their folders; register.cpp chooses.
ScratchBytes cuda_scratch_bytes(int index, const ScratchShape& shape);  // backends/cuda

}  // namespace flexcore
