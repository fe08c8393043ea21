#pragma once

#include <cstdint>

namespace flexcore::cpu {

/// The largest steps of a model, in which each op's scratch is largest.
struct ScratchShape {
  std::int64_t rows = 0, sampled_rows = 0, positions = 0;
  std::int64_t hidden_size = 0, intermediate_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, vocab_size = 0;
  std::int64_t rank = 0;  // of the adapters
  std::int64_t num_threads = 1;
};

/// Bytes that no op of such a step exceeds, provided that the weights are packed and that a backward unit has one
/// adapter. Each family's part is beside its launchers, from the same constants.
std::int64_t scratch_bytes(const ScratchShape& shape);

/// `outputs`: of all members that share x.
std::int64_t linear_scratch(std::int64_t rows, std::int64_t in_features, std::int64_t outputs,
                            std::int64_t num_threads);
std::int64_t lora_scratch(const ScratchShape& shape);
std::int64_t attention_scratch(const ScratchShape& shape);
std::int64_t cross_entropy_scratch(const ScratchShape& shape);
std::int64_t sampling_scratch(const ScratchShape& shape);

/// Features of the widest input, and of the widest outputs that share one: q, k, v or gate, up.
std::int64_t widest_input(const ScratchShape& shape);
std::int64_t widest_outputs(const ScratchShape& shape);

}  // namespace flexcore::cpu
