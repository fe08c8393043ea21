#pragma once

#include "backends/scratch.h"

namespace flexcore::cpu {

std::int64_t scratch_bytes(const ScratchShape& shape);

/// `outputs`: of all members that share x.
std::int64_t linear_scratch(std::int64_t rows, std::int64_t in_features, std::int64_t outputs, std::int64_t num_threads,
                            bool quantized);
std::int64_t lora_scratch(const ScratchShape& shape);
std::int64_t attention_scratch(const ScratchShape& shape);
std::int64_t cross_entropy_scratch(const ScratchShape& shape);
/// Rows of an output layer that an adapter changes.
std::int64_t adapted_output_scratch(const ScratchShape& shape);
std::int64_t sampling_scratch(const ScratchShape& shape);

}  // namespace flexcore::cpu
