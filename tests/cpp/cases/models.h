#pragma once

#include <cstdint>

namespace flexcore::cases {

struct ModelShape {
  const char* name;
  std::int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, num_layers;
};

inline constexpr ModelShape kSmolLm2{"smollm2", 576, 1536, 9, 3, 64, 49152, 30};       // SmolLM2-135M
inline constexpr ModelShape kLlama8b{"llama8b", 4096, 14336, 32, 8, 128, 128256, 32};  // Llama-3.1-8B

inline constexpr std::int64_t kBlockSize = 16;  // tokens of a page of keys and values
inline constexpr std::int64_t kRank = 16;       // of LoRA

}  // namespace flexcore::cases
