#include "model/archs/archs.h"
#include "model/archs/decoder.h"

namespace flexcore {

// Mistral 7B (arXiv 2310.06825): Llama without biases, with a sliding window that the configuration gives layer by
// layer.
Graph build_mistral(const ModelConfig& config, DType compute) { return build_decoder(config, {}, compute); }

}  // namespace flexcore
