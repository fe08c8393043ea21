#pragma once

#include <cstdint>

namespace flexcore::bench {

/// Multiply-adds on registers alone, in enough independent chains to fill the pipelines.
struct RegisterLoop {
  void (*run)(std::int64_t steps);
  double flops_per_step;
};

/// For the instruction set that the kernels use.
RegisterLoop float32_loop();
/// Of bfloat16 dot products; where the processor has none, the float32 loop.
RegisterLoop bfloat16_loop();

}  // namespace flexcore::bench
