#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

namespace flexcore {

/// What a step is made of, in the units that its time is linear in.
struct StepFeatures {
  std::int64_t decode_rows = 0;
  std::int64_t decode_context = 0;    // sum over decode rows of their context length
  std::int64_t prefill_tokens = 0;
  std::int64_t prefill_context = 0;   // sum over prefill rows of their context length
  std::int64_t sampled_rows = 0;
  std::int64_t finetune_tokens = 0;   // forward windows
  std::int64_t finetune_context = 0;  // sum over those rows of their context length
  std::int64_t backward_layer_tokens = 0;   // sum over units of rows
  std::int64_t backward_layer_context = 0;  // sum over units' rows of their context length
  std::int64_t backward_units = 0;

  bool any_forward() const { return decode_rows + prefill_tokens + finetune_tokens > 0; }
  bool any_finetune() const { return finetune_tokens + backward_units > 0; }
};

/// Predicted step time, linear in StepFeatures with a constant for the weights' pass (any forward) and one for the jump seen as soon as any finetuning
/// runs (FlexLLM section 6.2). Fitted from probe steps, corrected online by recursive least squares with forgetting; coefficients stay >= 0.
class CostModel {
 public:
  static constexpr int kTerms = 12;
  CostModel();

  double predict_ms(const StepFeatures& features) const;
  /// Upper quantile of the recent relative error: multiply a prediction by 1 + margin() to be safe.
  double margin() const;
  void observe(const StepFeatures& features, double measured_ms);
  /// Least squares over probes, from scratch.
  struct Sample {
    StepFeatures features;
    double measured_ms;
  };
  void fit(std::span<const Sample> samples);
  bool fitted() const;

  std::span<const double> coefficients() const;  // ms a unit
  static std::span<const char* const> term_names();
  std::int64_t num_observed() const;
  double overrun_share() const;  // share of recent steps that took > 1.1 x predicted

 private:
  std::array<double, kTerms> coefficients_{};
  std::array<std::array<double, kTerms>, kTerms> covariance_{};
  std::array<float, 128> recent_error_{};  // measured / predicted - 1, ring
  std::int64_t num_observed_ = 0;
  bool fitted_ = false;
};

}  // namespace flexcore
