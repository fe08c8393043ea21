#include "sched/cost_model.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "sched/least_squares.h"

namespace flexcore {
namespace {

constexpr int kTerms = CostModel::kTerms;
using Vector = std::array<double, kTerms>;

constexpr double kForgetting = 0.9;          // of one direction a step; with all in use, about 100 steps of memory
constexpr double kMaxVariance = 1e4;         // of theta, which is about 1, in units of the error's variance
constexpr double kMinUsualError = 0.02;      // below this, differences are noise
constexpr double kRestoredPrecision = 10.0;  // of coefficients from an earlier run: a few steps overrule them
constexpr double kGate = 3.0;                // usual errors that one step may count for
constexpr int kRobustRounds = 4;             // reweightings of a fit

constexpr std::array<const char*, kTerms> kTermNames = {
    "any_forward",      "decode_rows",           "decode_context",         "prefill_tokens",
    "prefill_context",  "sampled_rows",          "any_finetune",           "finetune_tokens",
    "finetune_context", "backward_layer_tokens", "backward_layer_context", "backward_units",
    "host_blocks"};
constexpr int kHostBlocks = kTerms - 1;

// Typical sizes, for terms that no probe had.
constexpr Vector kTypical = {1, 16, 8e3, 128, 3e4, 16, 1, 128, 3e4, 1e3, 3e5, 8, 16};

Vector terms_of(const StepFeatures& f) {
  return {f.any_forward() ? 1.0 : 0.0,
          static_cast<double>(f.decode_rows),
          static_cast<double>(f.decode_context),
          static_cast<double>(f.prefill_tokens),
          static_cast<double>(f.prefill_context),
          static_cast<double>(f.sampled_rows),
          f.any_finetune() ? 1.0 : 0.0,
          static_cast<double>(f.finetune_tokens),
          static_cast<double>(f.finetune_context),
          static_cast<double>(f.backward_layer_tokens) + f.recomputed_layer_tokens,
          static_cast<double>(f.backward_layer_context),
          static_cast<double>(f.backward_units),
          f.host_blocks};
}

bool usable(const Vector& terms, double measured_ms) {
  return std::isfinite(measured_ms) && measured_ms > 0.0 &&
         std::any_of(terms.begin(), terms.end(), [](double x) { return x > 0.0; });
}

double quantile(std::vector<double>& values, double q) {
  const auto nth = values.begin() + static_cast<std::ptrdiff_t>(q * static_cast<double>(values.size() - 1) + 0.5);
  std::nth_element(values.begin(), nth, values.end());
  return *nth;
}

}  // namespace

CostModel::CostModel() : scale_(kTypical) {}

std::span<const char* const> CostModel::term_names() { return kTermNames; }

double CostModel::predict(const Vector& terms) const {
  double sum = 0.0;
  for (int i = 0; i < kTerms; ++i) sum += coefficients_[i] * terms[i];
  return sum;
}

double CostModel::predict_ms(const StepFeatures& features) const { return fitted_ ? predict(terms_of(features)) : 0.0; }

CostModel::Vector CostModel::equation(const Vector& terms, double reference_ms) const {
  Vector row;
  for (int i = 0; i < kTerms; ++i) row[i] = terms[i] / scale_[i] * (time_scale_ / reference_ms);
  return row;
}

void CostModel::set_theta(const Vector& theta) {
  for (int i = 0; i < kTerms; ++i) coefficients_[i] = std::max(0.0, theta[i]) * time_scale_ / scale_[i];
}

// What is no part of the linear model stays.
void CostModel::forget_steps() {
  CostModel fresh;
  fresh.margin_quantile_ = margin_quantile_;
  fresh.swap_block_ms_ = swap_block_ms_;
  fresh.swap_observed_ = swap_observed_;
  *this = fresh;
}

void CostModel::fit(std::span<const Sample> samples) {
  std::vector<Vector> terms;
  std::vector<double> measured;
  for (const Sample& sample : samples) {
    const Vector t = terms_of(sample.features);
    if (!usable(t, sample.measured_ms)) continue;
    terms.push_back(t);
    measured.push_back(sample.measured_ms);
  }
  forget_steps();
  if (terms.empty()) return;

  std::vector<double> sorted = measured;
  time_scale_ = quantile(sorted, 0.5);
  for (int i = 0; i < kTerms; ++i) {
    double squares = 0.0, count = 0.0;
    for (const Vector& t : terms) {
      squares += t[i] * t[i];
      count += t[i] > 0.0;
    }
    if (count > 0.0) scale_[i] = std::sqrt(squares / count);
  }

  // Least squares of measured / reference with reweighting, so that a stalled probe counts for little (Huber).
  std::vector<double> weight(terms.size(), 1.0), error(terms.size());
  Matrix normal;
  for (int round = 0; round < kRobustRounds; ++round) {
    set_diagonal(normal, 1.0 / kMaxVariance);
    Vector right{};
    for (std::size_t s = 0; s < terms.size(); ++s) {
      // Weighing by the measured time favours what came out too short; later rounds weigh by the predicted one.
      const double reference = round == 0 ? measured[s] : std::max(predict(terms[s]), 0.1 * measured[s]);
      const Vector row = equation(terms[s], reference);
      add_outer(normal, row, weight[s]);
      for (int i = 0; i < kTerms; ++i) right[i] += weight[s] * row[i] * (measured[s] / reference);
    }
    set_theta(solve_non_negative(normal, right));
    for (std::size_t s = 0; s < terms.size(); ++s)
      error[s] = measured[s] / std::max(predict(terms[s]), 1e-3 * time_scale_) - 1.0;
    std::vector<double> sizes(error.size());
    std::transform(error.begin(), error.end(), sizes.begin(), [](double e) { return std::abs(e); });
    const double gate = kGate * std::max(kMinUsualError, 1.48 * quantile(sizes, 0.5));
    // Beyond the gate the influence falls (not only stays): probes repeat, and a stall is no information at all.
    for (std::size_t s = 0; s < terms.size(); ++s) {
      const double excess = gate / std::max(gate, std::abs(error[s]));
      weight[s] = excess * excess;
    }
  }
  if (std::none_of(terms.begin(), terms.end(), [](const Vector& t) { return t[kHostBlocks] > 0.0; }))
    coefficients_[kHostBlocks] = swap_block_ms_;
  precision_ = normal;
  for (double e : error) record(e);
  update_statistics();
  fitted_ = true;
}

void CostModel::restore(std::span<const double> coefficients) {
  forget_steps();
  double typical_ms = 0.0;
  for (int i = 0; i < kTerms; ++i) {
    coefficients_[i] = std::max(0.0, coefficients[static_cast<std::size_t>(i)]);
    typical_ms += coefficients_[i] * scale_[i];
  }
  time_scale_ = std::max(typical_ms, 1e-6);
  set_diagonal(precision_, kRestoredPrecision);
  fitted_ = true;
}

void CostModel::observe(const StepFeatures& features, double measured_ms) {
  const Vector terms = terms_of(features);
  if (!usable(terms, measured_ms)) return;
  ++num_observed_;
  if (time_scale_ <= 0.0) time_scale_ = measured_ms;

  // The equation is weighed by the predicted time, not the measured one: a stall must not weigh more for being long.
  const double predicted = predict(terms);
  const bool known = predicted > 1e-3 * measured_ms;
  const double reference = known ? predicted : measured_ms;
  const Vector row = equation(terms, reference);
  double error = (measured_ms - predicted) / reference;

  // Forget along this step's direction only (Cao and Schwartz, 2000): what no recent step has shown stays known.
  const Vector seen = multiply(precision_, row);
  if (const double size = dot(row, seen); size > 0.0) add_outer(precision_, seen, -(1.0 - kForgetting) / size);
  Matrix prior = precision_;
  for (int i = 0; i < kTerms; ++i) prior[i][i] += 1.0 / kMaxVariance;
  const Vector gain = multiply(inverse_spd(prior), row);
  const double excitation = dot(row, gain);
  if (known) {
    // What is surprising depends on how well the terms of this step are known.
    const double gate = kGate * usual_error() * std::sqrt(1.0 + excitation);
    record(error);
    error = std::clamp(error, -gate, gate);
  }
  Vector before, theta;
  for (int i = 0; i < kTerms; ++i) {
    before[i] = coefficients_[i] * scale_[i] / time_scale_;
    theta[i] = before[i] + gain[i] / (1.0 + excitation) * error;
  }
  if (*std::min_element(theta.begin(), theta.end()) < 0.0) {
    // The nearest to `before`, in the metric of what is known, among those that are not negative.
    Vector right = multiply(prior, before);
    const double target = dot(row, before) + error;
    for (int i = 0; i < kTerms; ++i) right[i] += row[i] * target;
    add_outer(prior, row, 1.0);
    theta = solve_non_negative(prior, right);
  }
  if (std::all_of(theta.begin(), theta.end(), [](double x) { return std::isfinite(x); })) {
    set_theta(theta);
    add_outer(precision_, row, 1.0);
  } else {
    set_diagonal(precision_, 0.0);
  }

  update_statistics();
  fitted_ = fitted_ || num_observed_ >= kWarmup;
}

void CostModel::record(double relative_error) {
  recent_error_[static_cast<std::size_t>(num_errors_++) % recent_error_.size()] = static_cast<float>(relative_error);
}

double CostModel::error_quantile(double quantile) const {
  const auto count = std::min<std::size_t>(static_cast<std::size_t>(num_errors_), recent_error_.size());
  if (count == 0) return 0.0;
  std::array<float, 128> sorted = recent_error_;
  const auto end = sorted.begin() + static_cast<std::ptrdiff_t>(count);
  const auto nth = sorted.begin() + static_cast<std::ptrdiff_t>(quantile * static_cast<double>(count - 1) + 0.5);
  std::nth_element(sorted.begin(), nth, end);
  return static_cast<double>(*nth);
}

void CostModel::set_margin_quantile(double quantile) {
  margin_quantile_ = quantile;
  update_statistics();
}

void CostModel::update_statistics() {
  const auto count = std::min<std::size_t>(static_cast<std::size_t>(num_errors_), recent_error_.size());
  if (count == 0) return;
  const auto end = recent_error_.begin() + static_cast<std::ptrdiff_t>(count);
  overrun_share_ = static_cast<double>(std::count_if(recent_error_.begin(), end, [](float e) { return e > 0.1f; })) /
                   static_cast<double>(count);
  margin_ = std::clamp(error_quantile(margin_quantile_), 0.0, 0.5);
}

double CostModel::usual_error() const {
  // The last 15 only: after a lasting change more than half of them are large within 8 steps, and the gate opens.
  constexpr std::int64_t kWindow = 15;
  const std::int64_t count = std::min(num_errors_, kWindow);
  if (count == 0) return 1.0;
  std::array<float, kWindow> sizes;
  for (std::int64_t i = 0; i < count; ++i)
    sizes[static_cast<std::size_t>(i)] =
        std::abs(recent_error_[static_cast<std::size_t>(num_errors_ - 1 - i) % recent_error_.size()]);
  const auto nth = sizes.begin() + count / 2;
  std::nth_element(sizes.begin(), nth, sizes.begin() + count);
  return std::max(kMinUsualError, 1.48 * static_cast<double>(*nth));
}

void CostModel::observe_swap(std::int64_t blocks, double measured_ms) {
  constexpr double kWeight = 0.25;  // of the newest
  if (blocks < 1 || !(measured_ms > 0.0) || !std::isfinite(measured_ms)) return;
  const double ms = measured_ms / static_cast<double>(blocks);
  swap_block_ms_ = swap_observed_ ? (1.0 - kWeight) * swap_block_ms_ + kWeight * ms : ms;
  swap_observed_ = true;
}

}  // namespace flexcore
