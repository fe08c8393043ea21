#include "model/archs/archs.h"
#include "model/archs/decoder.h"

namespace flexcore {

// Llama 2, 3, 3.1, 3.2 and models of the same shape (SmolLM2): biases only where the configuration asks for them.
Graph build_llama(const ModelConfig& config, DType compute) {
  return build_decoder(
      config,
      {.qkv_bias = config.attention_bias, .output_bias = config.attention_output_bias, .mlp_bias = config.mlp_bias},
      compute);
}

}  // namespace flexcore
