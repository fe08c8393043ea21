#pragma once

#include <memory>

#include "graph/operator.h"

namespace flexcore {

/// in: x, the embeddings; out: x where an adapter changes them, in place: + scaling * A[:, token]^T B^T (PEFT's LoRA of
/// an embedding), or rows of a table of the adapter's own. `site`: of the embedding.
std::shared_ptr<const Operator> embedding_bypass_op(SiteId site);

/// Adds to the gradients of the rows' adapters. grad_x: of the embeddings [kTokens, hidden_size] float32, which is the
/// gradient of the first layer's input.
void add_embedding_gradients(OpContext& context, const BatchState& batch, SiteId site, const TensorView& grad_x);

/// in: logits, hidden; out: the logits of rows whose adapter has an output layer of its own, in place. `site`: of the
/// output layer.
std::shared_ptr<const Operator> own_output_op(SiteId site);

}  // namespace flexcore
