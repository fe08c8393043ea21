#pragma once

#include "ops/registry.h"

namespace flexcore::cuda {

void register_elementwise(OpRegistry& registry);  // elementwise.cu: norms, rotary, silu_mul, rows in and out

}  // namespace flexcore::cuda
