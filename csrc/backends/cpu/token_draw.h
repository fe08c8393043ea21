#pragma once

#include <span>
#include <utility>

#include "backends/cpu/kernels/softmax.h"
#include "ops/sampling.h"

namespace flexcore::cpu {

/// Room of one worker for one row at a time.
struct DrawScratch {
  float* logits;         // [vocab_size]
  float* values;         // [vocab_size]
  float* probabilities;  // [vocab_size]
  std::int32_t* ids;     // [vocab_size]
  std::int32_t* order;   // [vocab_size]
  std::int32_t* counts;  // [vocab_size], zeros between rows
};

/// Applies logit_bias, the penalties and the mask of a row to scratch.logits.
void adjust_logits(const SamplingRow& row, DrawScratch& scratch);

/// temperature, top_k, top_p, min_p and the draw. `peak` is that of `logits`; the temperature is above 0.
/// Tokens are laid end to end by id, each as long as its probability, and the draw is a point on that line.
std::int32_t draw_token(const SamplingRow& row, std::span<const float> logits, const RowPeak& peak,
                        DrawScratch& scratch);

/// The top.size() largest logits, less `log_sum_exp`; descending, ties by id.
void top_log_probabilities(std::span<const float> logits, double log_sum_exp,
                           std::span<std::pair<std::int32_t, float>> top, DrawScratch& scratch);

}  // namespace flexcore::cpu
