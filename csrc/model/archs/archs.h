#pragma once

#include "graph/graph.h"
#include "model/config.h"

namespace flexcore {

// One file an architecture; build_model picks by the configuration. `compute`: dtype of weights and activations.
Graph build_llama(const ModelConfig& config, DType compute);
Graph build_mistral(const ModelConfig& config, DType compute);
Graph build_qwen2(const ModelConfig& config, DType compute);
Graph build_qwen3(const ModelConfig& config, DType compute);

Graph build_model(const ModelConfig& config, DType compute);

}  // namespace flexcore
