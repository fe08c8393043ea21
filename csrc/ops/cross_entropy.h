#pragma once

#include "ops/weight.h"

namespace flexcore {

/// Fused linear + cross-entropy: logits = hidden W^T are made in chunks of the vocabulary and never stored. One pass:
/// the softmax denominator and the weighted sum of W's rows are kept online, as in flash attention.
///   loss[i] = logsumexp(logits[i]) - logits[i, labels[i]]
///   grad_hidden[i] = grad_scale[i] * (softmax(logits[i]) - onehot(labels[i])) W
struct LinearCrossEntropyArgs {
  static constexpr std::string_view kName = "linear_cross_entropy";
  TensorView hidden;       // [rows, hidden_size] float32 or bfloat16
  WeightView weight;       // [vocab_size, hidden_size]
  TensorView labels;       // [rows] int32, in [0, vocab_size)
  TensorView loss;         // [rows] float32
  TensorView grad_scale;   // [rows] float32; empty when grad_hidden is
  TensorView grad_hidden;  // [rows, hidden_size] float32, written; empty: loss only
};
void check(const LinearCrossEntropyArgs& args);

}  // namespace flexcore
