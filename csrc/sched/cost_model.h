#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace flexcore {

/// What a step is made of, in the units that its time is linear in.
struct StepFeatures {
  std::int64_t decode_rows = 0;
  std::int64_t decode_context = 0;  // sum over decode rows of their context length
  std::int64_t prefill_tokens = 0;
  std::int64_t prefill_context = 0;  // sum over prefill rows of their context length
  std::int64_t sampled_rows = 0;
  std::int64_t finetune_tokens = 0;         // forward windows
  std::int64_t finetune_context = 0;        // sum over those rows of their context length
  std::int64_t backward_layer_tokens = 0;   // sum over units of rows
  double recomputed_layer_tokens = 0.0;     // what making activations again adds to them
  std::int64_t backward_layer_context = 0;  // sum over units' rows of their context length
  std::int64_t backward_units = 0;
  double host_blocks = 0.0;  // pages' worth of activations that go to host memory or come from there

  bool any_forward() const { return decode_rows + prefill_tokens + finetune_tokens > 0; }
  bool any_finetune() const { return finetune_tokens + backward_units > 0; }
};

/// Predicted step time, linear in StepFeatures with a constant for the weights' pass (any forward) and one for the jump
/// seen as soon as any finetuning runs (FlexLLM, arXiv 2402.18789, section 6.2). Fitted from probe steps, corrected
/// online by recursive least squares with directional forgetting. Errors are weighed relative to the step's time;
/// coefficients stay
/// >= 0; a stall moves the model by no more than a few usual errors. Not thread-safe.
class CostModel {
 public:
  static constexpr int kTerms = 13;
  CostModel();

  /// 0 until there is a fit, or kWarmup observations.
  double predict_ms(const StepFeatures& features) const;
  /// Upper quantile of the recent relative error in [0, 0.5]: multiply a prediction by 1 + margin() to be safe.
  double margin() const { return margin_; }
  void set_margin_quantile(double quantile);
  /// Of the recent relative error, measured / predicted - 1; 0 when nothing was observed.
  double error_quantile(double quantile) const;
  /// Times that are not finite and positive, and steps without work, are ignored.
  void observe(const StepFeatures& features, double measured_ms);
  /// Least squares over probes, from scratch; useless samples are ignored as in `observe`. Host blocks that no probe
  /// had go at the rate of swaps.
  struct Sample {
    StepFeatures features;
    double measured_ms;
  };
  void fit(std::span<const Sample> samples);
  bool fitted() const { return fitted_; }
  /// Goes on from coefficients that were good once, in the order of term_names().
  void restore(std::span<const double> coefficients);

  std::span<const double> coefficients() const { return coefficients_; }  // ms a unit
  static std::span<const char* const> term_names();
  std::int64_t num_observed() const { return num_observed_; }
  double overrun_share() const { return overrun_share_; }  // share of recent steps that took > 1.1 x predicted

  /// Of copying so many pages of the pool to host memory, or back; until some were, at the rate of set_swap_ms.
  double swap_ms(std::int64_t blocks) const { return static_cast<double>(blocks) * swap_block_ms_; }
  void set_swap_ms(double ms_per_block) { swap_block_ms_ = ms_per_block; }
  void observe_swap(std::int64_t blocks, double measured_ms);

  static constexpr std::int64_t kWarmup = 16;  // observations that count as a fit

 private:
  using Vector = std::array<double, kTerms>;
  using Matrix = std::array<Vector, kTerms>;

  /// One equation theta . row = 1 for a step that took `reference_ms`; theta = coefficient * scale / time_scale.
  Vector equation(const Vector& terms, double reference_ms) const;
  double predict(const Vector& terms) const;
  void set_theta(const Vector& theta);
  void record(double relative_error);
  void update_statistics();
  double usual_error() const;
  void forget_steps();

  Vector coefficients_{};
  Vector scale_{};                         // typical size of each term
  double time_scale_ = 0.0;                // typical step, ms; 0: not known
  Matrix precision_{};                     // of theta: inverse covariance, in units of the error's variance
  std::array<float, 128> recent_error_{};  // measured / predicted - 1, ring
  std::int64_t num_errors_ = 0;            // ever put in the ring
  std::int64_t num_observed_ = 0;
  double margin_ = 0.0, margin_quantile_ = 0.95;
  double overrun_share_ = 0.0;
  double swap_block_ms_ = 0.0;
  bool swap_observed_ = false;
  bool fitted_ = false;
};

}  // namespace flexcore
