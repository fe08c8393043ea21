#pragma once

#include "backends/scratch.h"

namespace flexcore::cuda {

/// What the size of launches follows.
struct DeviceSize {
  std::int64_t num_multiprocessors, l2_bytes;
};

/// Most that the GEMM library is given.
inline constexpr std::int64_t kGemmWorkspaceBytes = std::int64_t{32} << 20;

std::int64_t linear_scratch(const ScratchShape& shape);
/// Tables that stay for a batch, and what one call takes.
std::int64_t attention_tables_bytes(const ScratchShape& shape, const DeviceSize& device);
std::int64_t attention_scratch(const ScratchShape& shape, const DeviceSize& device);
std::int64_t lora_scratch(const ScratchShape& shape, bool backward);
std::int64_t cross_entropy_scratch(const ScratchShape& shape, const DeviceSize& device);
/// Rows of an output layer that an adapter changes.
std::int64_t adapted_output_scratch(const ScratchShape& shape);
/// Provided that no request wants more than 2,048 log-probabilities.
std::int64_t sampling_scratch(const ScratchShape& shape, const DeviceSize& device);

}  // namespace flexcore::cuda
