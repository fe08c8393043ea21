#pragma once

#include <cstdint>

namespace flexcore {

/// Where bytes are, the fastest first.
enum class Tier : std::uint8_t { kDevice, kHost, kDisk };

}  // namespace flexcore
