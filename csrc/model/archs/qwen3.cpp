#include "model/archs/archs.h"
#include "model/archs/decoder.h"

namespace flexcore {

// Qwen3 (arXiv 2505.09388): every query and key head is normalised before the rotation.
Graph build_qwen3(const ModelConfig& config, DType compute) {
  return build_decoder(
      config, {.qkv_bias = config.attention_bias, .output_bias = config.attention_output_bias, .qk_norm = true},
      compute);
}

}  // namespace flexcore
