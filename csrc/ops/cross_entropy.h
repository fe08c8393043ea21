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

/// The same of logits that are there, where an adapter changes the output layer: the product with W is not fused.
///   logits[i] = grad_scale[i] * (softmax(logits[i]) - onehot(labels[i])), in place
struct CrossEntropyArgs {
  static constexpr std::string_view kName = "cross_entropy";
  TensorView logits;      // [rows, vocab_size] float32
  TensorView labels;      // [rows] int32, in [0, vocab_size)
  TensorView loss;        // [rows] float32
  TensorView grad_scale;  // [rows] float32; empty: loss only, and the logits are lost
};
void check(const CrossEntropyArgs& args);

/// Tokens whose part of an adapter's output layer is differentiated at once.
inline constexpr std::int64_t kVocabularyChunk = 2048;
/// Rows whose logits are there at once: a few MiB of them on the CPU, enough for its GEMMs on CUDA.
std::int64_t logit_rows(DeviceKind device, std::int64_t vocab_size);

}  // namespace flexcore
