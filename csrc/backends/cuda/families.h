#pragma once

#include "ops/registry.h"

namespace flexcore::cuda {

void register_elementwise(OpRegistry& registry);         // elementwise.cu: norms, rotary, silu_mul, rows in and out
void register_attention(OpRegistry& registry);           // attention.cu: kv_write, attention; and the next
void register_attention_backward(OpRegistry& registry);  // attention_backward.cu
void register_linear(OpRegistry& registry);              // linear.cu: packing, linear, linear_backward, embedding
void register_lora(OpRegistry& registry);                // lora.cu: lora_forward, lora_backward
void register_bypass(OpRegistry& registry);              // bypass.cu: scale, scale_backward, dropout, dora_scale
void register_cross_entropy(OpRegistry& registry);       // cross_entropy.cu: linear_cross_entropy, cross_entropy
void register_sampling(OpRegistry& registry);            // sampling.cu: sample
void register_product(OpRegistry& registry);             // product.cu: product, table_look_up, table_add
void register_optimizer(OpRegistry& registry);           // optimizer.cu: sum_squares, adamw, sgd
void register_transfer(OpRegistry& registry);            // transfer.cpp: stage, fetch

}  // namespace flexcore::cuda
