#include "model/rotary.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/check.h"

namespace flexcore {

namespace {

void scale_llama3(const RopeConfig& rope, std::vector<float>& frequencies) {
  const double context = static_cast<double>(rope.original_max_position_embeddings);
  const auto low_wavelength = static_cast<float>(context / rope.low_freq_factor);
  const auto high_wavelength = static_cast<float>(context / rope.high_freq_factor);
  const auto factor = static_cast<float>(rope.factor), low = static_cast<float>(rope.low_freq_factor);
  for (float& frequency : frequencies) {
    const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;
    if (wavelength > low_wavelength) {
      frequency /= factor;
    } else if (wavelength >= high_wavelength) {
      const float smooth = (static_cast<float>(context) / wavelength - low) /
                           static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
      frequency = (1.0f - smooth) * frequency / factor + smooth * frequency;
    }
  }
}

/// Slow pairs are interpolated, fast ones kept, with a ramp between the pairs that turn beta_slow and beta_fast times.
/// `wavelengths`: theta ** (2 i / head_dim), the plain frequencies' inverses before rounding.
void scale_yarn(const RopeConfig& rope, std::int64_t head_dim, const std::vector<float>& wavelengths,
                std::vector<float>& frequencies) {
  const auto dim = static_cast<double>(head_dim);
  const auto pair_that_turns = [&](double rotations) {
    const double context = static_cast<double>(rope.original_max_position_embeddings);
    return dim * std::log(context / (rotations * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
  };
  double low = pair_that_turns(rope.beta_fast), high = pair_that_turns(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float position = (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
    const float kept = 1.0f - std::clamp(position, 0.0f, 1.0f);
    const float interpolated = 1.0f / (static_cast<float>(rope.factor) * wavelengths[i]);
    frequencies[i] = interpolated * (1.0f - kept) + frequencies[i] * kept;
  }
}

}  // namespace

std::vector<float> rotary_inverse_frequencies(const RopeConfig& rope, std::int64_t head_dim) {
  std::vector<float> wavelengths(static_cast<std::size_t>(head_dim / 2)), frequencies(wavelengths.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    wavelengths[i] = std::pow(static_cast<float>(rope.theta), exponent);
    frequencies[i] = 1.0f / wavelengths[i];
  }
  switch (rope.type) {
    case RopeConfig::Type::kDefault:
      break;
    case RopeConfig::Type::kLinear:
      for (float& frequency : frequencies) frequency /= static_cast<float>(rope.factor);
      break;
    case RopeConfig::Type::kLlama3:
      scale_llama3(rope, frequencies);
      break;
    case RopeConfig::Type::kYarn:
      scale_yarn(rope, head_dim, wavelengths, frequencies);
      break;
  }
  return frequencies;
}

void fill_rotary_tables(const ModelConfig& config, const TensorView& cos, const TensorView& sin) {
  for (const auto& [name, table] : {std::pair{"cos", cos}, std::pair{"sin", sin}})
    require(table.ndim() == 2 && table.shape(0) == cos.shape(0) && table.shape(1) == config.head_dim / 2 &&
                table.dtype() == DType::kFloat32 && table.contiguous(),
            "rotary tables: ", name, ": ", table.describe(), ", wanted float32 [max_positions, ", config.head_dim / 2,
            "]");
  const auto frequencies = rotary_inverse_frequencies(config.rope, config.head_dim);
  const auto scale = static_cast<float>(config.rope.attention_factor);
  for (std::int64_t position = 0; position < cos.shape(0); ++position) {
    float *cos_row = cos.row<float>(position), *sin_row = sin.row<float>(position);
    for (std::size_t i = 0; i < frequencies.size(); ++i) {
      const float angle = static_cast<float>(position) * frequencies[i];
      cos_row[i] = std::cos(angle) * scale;
      sin_row[i] = std::sin(angle) * scale;
    }
  }
}

}  // namespace flexcore
