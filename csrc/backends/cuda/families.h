#pragma once

#include "ops/registry.h"

namespace flexcore::cuda {

void register_elementwise(OpRegistry& registry);  // elementwise.cu: norms, rotary, silu_mul, rows in and out
void register_linear(OpRegistry& registry);       // linear.cu: packing, linear, linear_backward, embedding
void register_transfer(OpRegistry& registry);     // transfer.cpp: stage, fetch

}  // namespace flexcore::cuda
