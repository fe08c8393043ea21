#pragma once

#include <memory>

#include "graph/operator.h"

namespace flexcore {

/// in: none; out: x [kTokens, hidden_size].
std::shared_ptr<const Operator> embedding_op(ParamId weight);
/// y = x, for what a node would overwrite.
std::shared_ptr<const Operator> copy_op();
/// in: x; out: y of the same width, normalised in groups of the weight's width (whole rows, or heads).
std::shared_ptr<const Operator> rms_norm_op(ParamId weight, std::int64_t group, float eps);
/// in: x; out: rotated x, in place.
std::shared_ptr<const Operator> rotary_op(std::int64_t num_heads, std::int64_t head_dim, bool inverse = false);

struct AttentionShape {
  std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  float scale = 1.0f;
  std::int64_t sliding_window = 0;  // 0: none
};
/// in: x; out: x with the embeddings of virtual tokens, in place. Their gradient is that of the first layer's input.
std::shared_ptr<const Operator> prompt_op();
/// in: k (rotated), v; out: both, with those of virtual tokens, in place.
std::shared_ptr<const Operator> prefix_op();
/// in: q, k (rotated), v; out: y, lse [kTokens, num_heads]. Writes k and v to the layer's pages.
std::shared_ptr<const Operator> attention_op(const AttentionShape& shape);
/// in: gate, up; out: silu(gate) * up.
std::shared_ptr<const Operator> silu_mul_op();
/// in: x [kTokens]; out: its rows of the row set (sampled rows, or rows with a target).
std::shared_ptr<const Operator> gather_op(RowSet rows);
/// in: hidden [kTargets]; out: gradient of hidden, already scaled. Writes the batch's loss.
/// `site`: of the output layer.
std::shared_ptr<const Operator> cross_entropy_op(ParamId weight, SiteId site);

}  // namespace flexcore
