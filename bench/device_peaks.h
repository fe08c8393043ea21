#pragma once

#include "backends/register.h"
#include "ops/context.h"
#include "peaks.h"

namespace flexcore::bench {

/// What a GPU does at best for us: its copies, our sum of squares as a reader of memory, the GEMM library at a size
/// that fills it, on random numbers. Takes about 2 GB of its memory.
Peaks measure_device_peaks(OpContext& context, DeviceRuntime& device);

}  // namespace flexcore::bench
