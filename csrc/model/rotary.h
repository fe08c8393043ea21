#pragma once

#include <vector>

#include "flexcore/tensor.h"
#include "model/config.h"

namespace flexcore {

/// Angle a position turns pair i by, [head_dim / 2], in the float32 arithmetic of transformers
/// (modeling_rope_utils.py). Linear scaling is Chen et al. 2023, yarn is Peng et al. 2023, llama3 is that of Llama 3.1.
std::vector<float> rotary_inverse_frequencies(const RopeConfig& rope, std::int64_t head_dim);

/// cos and sin of position * frequency, times the attention factor.
/// `cos`, `sin`: [max_positions, head_dim / 2] float32 in host memory.
void fill_rotary_tables(const ModelConfig& config, const TensorView& cos, const TensorView& sin);

}  // namespace flexcore
