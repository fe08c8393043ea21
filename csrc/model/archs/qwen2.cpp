#include "model/archs/archs.h"
#include "model/archs/decoder.h"

namespace flexcore {

// Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on q, k, v; the upper layers may have a sliding window.
Graph build_qwen2(const ModelConfig& config, DType compute) {
  return build_decoder(config, {.qkv_bias = true}, compute);
}

}  // namespace flexcore
