#pragma once

#include "cases/op_case.h"
#include "core/thread_pool.h"

namespace flexcore::bench {

/// What this machine, or a GPU of it, can do at best, measured with the same threads as the cases.
struct Peaks {
  double read_bandwidth = 0;  // bytes/s, from memory
  double copy_bandwidth = 0;  // bytes/s, read and written both counted
  double float32_flops = 0;   // FLOP/s of fused multiply-adds in registers; of a GPU, in a large GEMM
  double bfloat16_flops = 0;  // FLOP/s of bfloat16 dot products, likewise; without such an instruction, float32's

  /// The better of both, field by field: a probe that was disturbed says too little, never too much.
  void take_best(const Peaks& other);
  /// Seconds that a call takes at least: memory and arithmetic at their peaks, one hidden behind the other.
  double floor(const cases::Cost& cost) const;
  double memory_seconds(const cases::Cost& cost) const;
  double arithmetic_seconds(const cases::Cost& cost) const;
};

/// About a second.
Peaks measure_peaks(ThreadPool& threads);

}  // namespace flexcore::bench
