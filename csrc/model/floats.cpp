#include "model/floats.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "core/bfloat16.h"
#include "core/check.h"

namespace flexcore {

namespace {

float from_float16(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  // Denormals come out right from the product; infinity and NaN have an exponent of their own.
  const float finite = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const std::uint32_t special = 0x7f800000u | magnitude << 13;
  return std::bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : std::bit_cast<std::uint32_t>(finite)));
}

/// Whether all magnitudes are below `limit`. `memcpy` because `data` may have any alignment; `Bits` is signed because
/// that is the maximum that the baseline instruction set has.
template <class Bits>
bool all_below(const std::byte* data, std::int64_t count, Bits limit) {
  constexpr std::int64_t kBlock = 4096;  // elements between looks at the result
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, count);
    Bits largest = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, data + i * static_cast<std::int64_t>(sizeof bits), sizeof bits);
      largest = std::max(largest, static_cast<Bits>(bits & kMagnitude));
    }
    if (largest >= limit) return false;
  }
  return true;
}

[[noreturn]] void refuse(DType dtype) {
  throw InvalidArgument(str("dtype ", dtype_name(dtype), ", wanted float32, bfloat16 or float16"));
}

}  // namespace

bool all_finite(const TensorView& source, std::int64_t begin, std::int64_t end, DType target) {
  const auto* data = source.as<const std::byte>() + begin * static_cast<std::int64_t>(dtype_size(source.dtype()));
  switch (source.dtype()) {
    case DType::kFloat32:  // 0x7f7f8000 and above round to infinity in bfloat16
      return all_below<std::int32_t>(data, end - begin, target == DType::kBFloat16 ? 0x7f7f8000 : 0x7f800000);
    case DType::kBFloat16:
      return all_below<std::int16_t>(data, end - begin, 0x7f80);
    case DType::kFloat16:
      return all_below<std::int16_t>(data, end - begin, 0x7c00);
    default:
      refuse(source.dtype());
  }
}

void to_float32(const TensorView& source, float* out) {
  const auto* data = source.as<const std::byte>();
  const std::int64_t count = source.size();
  if (count == 0) return;
  if (source.dtype() == DType::kFloat32) {
    std::memcpy(out, data, source.bytes());
    return;
  }
  if (source.dtype() != DType::kBFloat16 && source.dtype() != DType::kFloat16) refuse(source.dtype());
  const bool brain = source.dtype() == DType::kBFloat16;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, data + 2 * i, sizeof bits);
    out[i] = brain ? to_float(bfloat16{bits}) : from_float16(bits);
  }
}

}  // namespace flexcore
