#pragma once

#include "graph/builder.h"
#include "model/config.h"

namespace flexcore {

/// What distinguishes one pre-norm decoder family from the next; sizes come from the configuration.
struct DecoderTraits {
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // RMS norm of every query and key head before the rotation
};

/// Embedding, layers of (norm, grouped-query attention, norm, gated MLP) on a residual stream, final norm, output
/// layer; parameters named as in Hugging Face checkpoints.
Graph build_decoder(const ModelConfig& config, const DecoderTraits& traits, DType compute);

}  // namespace flexcore
