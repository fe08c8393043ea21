#pragma once

#include <span>
#include <utility>

#include "ops/registry.h"

namespace flexcore {

/// How one row's next token is chosen. Order: logit_bias, repetition / presence / frequency penalties, min_tokens mask
/// (forbidden), temperature, top_k, top_p, min_p, then a draw from a counter-based generator keyed by (seed, counter):
/// the draw depends on nothing else.
struct SamplingRow {
  float temperature = 1.0f;  // 0: greedy (lowest id among equals)
  float top_p = 1.0f;
  float min_p = 0.0f;
  std::int32_t top_k = 0;                                   // 0 or -1: off
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;  // over generated tokens
  float repetition_penalty = 1.0f;                          // over prompt and generated tokens
  std::uint64_t seed = 0;
  std::uint64_t counter = 0;  // index of the token in its request
  std::span<const std::int32_t> prompt{}, generated{};
  std::span<const std::pair<std::int32_t, float>> logit_bias{};
  std::span<const std::int32_t> forbidden{};  // tokens that may not come now
  std::int32_t num_logprobs = -1;             // -1: none wanted; k: the chosen token and the k most likely
};

/// Log-probabilities are those of the raw logits (log-softmax before any change), as vLLM's default.
struct SamplingResult {
  std::int32_t token = 0;
  float logprob = 0.0f;
  std::span<std::pair<std::int32_t, float>> top{};  // room for num_logprobs entries, filled, descending; ties by id
};

/// Throws Error that names the row when a row's logits have NaN or +infinity, or leave no token to choose; no token is
/// set then.
struct SampleArgs {
  static constexpr std::string_view kName = "sample";
  TensorView logits;  // [rows, vocab_size] float32; a backend may overwrite them
  std::span<const SamplingRow> rows;
  std::span<SamplingResult> results;  // [rows]
};
void check(const SampleArgs& args);

}  // namespace flexcore
