#pragma once

#include "ops/registry.h"

namespace flexcore::cpu {

void register_linear(OpRegistry& registry);         // linear.cpp: packing, linear, linear_backward, embedding
void register_lora(OpRegistry& registry);           // lora.cpp: lora_forward, lora_backward
void register_bypass(OpRegistry& registry);         // bypass.cpp: scale, scale_backward, dropout, dora_scale
void register_attention(OpRegistry& registry);      // attention.cpp: kv_write, attention, attention_backward
void register_elementwise(OpRegistry& registry);    // elementwise.cpp: norms, rotary, silu_mul, gather_rows, copy
void register_cross_entropy(OpRegistry& registry);  // cross_entropy.cpp: linear_cross_entropy, cross_entropy
void register_product(OpRegistry& registry);        // product.cpp: product, table_look_up, table_add
void register_optimizer(OpRegistry& registry);      // optimizer.cpp: sum_squares, adamw, sgd
void register_scatter(OpRegistry& registry);        // scatter.cpp: zero, scatter_rows, save_rows
void register_sampling(OpRegistry& registry);       // sampling.cpp: sample
void register_transfer(OpRegistry& registry);       // transfer.cpp: stage, fetch

}  // namespace flexcore::cpu
