#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "op_fixture.h"
#include "ops/rows.h"

namespace flexcore::test {

inline std::string format_name(const WeightFormat& format) {
  const char* const names[] = {"dense", "int8", "int4", "nf4"};
  return std::string(names[static_cast<int>(format.kind)]) + "/" + std::to_string(format.group_size);
}

/// What a quantised weight should be worth, by plain loops over groups.
inline void quantize_plainly(const WeightFormat& format, DType dtype, Matrix& w) {
  static constexpr float kLevels[16] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  const auto value = [&](std::int64_t i, std::int64_t j) { return static_cast<float>(w(i, j)); };
  const auto set = [&](std::int64_t i, std::int64_t j, float x) {
    w.set(i, j, dtype == DType::kBFloat16 ? to_float(to_bfloat16(x)) : x);
  };
  for (std::int64_t i = 0; i < w.rows(); ++i) {
    for (std::int64_t begin = 0; begin < w.width(); begin += format.group_size) {
      const std::int64_t end = std::min(begin + format.group_size, w.width());
      float low = value(i, begin), high = low;
      for (std::int64_t j = begin; j < end; ++j) {
        low = std::min(low, value(i, j));
        high = std::max(high, value(i, j));
      }
      if (format.kind == WeightFormat::Kind::kNf4) {
        const float absmax = std::max(std::abs(low), std::abs(high));
        for (std::int64_t j = begin; j < end; ++j) {
          const float x = absmax > 0 ? value(i, j) / absmax : 0.0f;
          int code = 0;  // the nearest level's: as many as there are midpoints below
          while (code < 15 && x > 0.5f * (kLevels[code] + kLevels[code + 1])) ++code;
          set(i, j, kLevels[code] * absmax);
        }
        continue;
      }
      const float levels = format.kind == WeightFormat::Kind::kInt8 ? 255.0f : 15.0f;
      const float min = to_float(to_bfloat16(low));
      const float scale = to_float(to_bfloat16(std::max(0.0f, (high - min) / levels)));
      for (std::int64_t j = begin; j < end; ++j) {
        const float code = scale > 0 ? std::clamp(std::nearbyint((value(i, j) - min) / scale), 0.0f, levels) : 0.0f;
        set(i, j, min + static_cast<float>(code * scale));
      }
    }
  }
}

/// A weight, quantised by the op, and what it is worth as a dense one.
struct QuantizedWeight {
  QuantizedWeight(OpFixture& ops, const WeightFormat& format_, DType dtype, Matrix source)
      : format(format_), values(dtype, source.rows(), source.width()), worth(std::move(source)) {
    std::size_t size = 0;
    ops.run(PackedWeightBytesArgs{worth.rows(), worth.width(), dtype, &size, format});
    bytes.assign(size, std::byte{0xff});
    ops.run(PackWeightArgs{worth.view(), dtype, bytes.data(), format});
    quantize_plainly(format, dtype, worth);
    for (std::int64_t i = 0; i < values.rows(); ++i)
      for (std::int64_t j = 0; j < values.width(); ++j) values.set(i, j, static_cast<float>(worth(i, j)));
  }
  WeightView view() const { return {bytes.data(), values.dtype(), values.rows(), values.width(), true, format}; }
  WeightView dense() { return {values.view().data(), values.dtype(), values.rows(), values.width(), false}; }

  WeightFormat format;
  Matrix values;  // in the dtype
  Matrix worth;   // the same, in the dtype of the source
  SharedVector<std::byte> bytes;
};

inline std::vector<WeightFormat> quantized_formats() {
  using enum WeightFormat::Kind;
  return {{kInt8, 64}, {kInt4, 64}, {kNf4, 64}, {kInt8, 16}, {kInt4, 32}, {kNf4, 128}};
}

}  // namespace flexcore::test
