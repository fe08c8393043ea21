#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flexcore {

class Json;

enum class Architecture : std::uint8_t { kLlama, kMistral, kQwen2, kQwen3 };

/// Rotary position embedding. `rotary.h` turns it into tables.
struct RopeConfig {
  enum class Type : std::uint8_t { kDefault, kLinear, kLlama3, kYarn };
  Type type = Type::kDefault;
  double theta = 10000.0;
  double factor = 1.0;                                // linear, llama3, yarn: how far the context is stretched
  double low_freq_factor = 1.0;                       // llama3
  double high_freq_factor = 4.0;                      // llama3
  double beta_fast = 32.0;                            // yarn
  double beta_slow = 1.0;                             // yarn
  bool truncate = true;                               // yarn
  double attention_factor = 1.0;                      // yarn: multiplies cosine and sine
  std::int64_t original_max_position_embeddings = 0;  // llama3, yarn
};

/// What config.json and generation_config.json say, checked, with the defaults of Hugging Face transformers 5 filled
/// in.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  std::string architecture_name;  // "LlamaForCausalLM"
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;  // divides num_heads
  std::int64_t head_dim = 0;      // a multiple of 8
  std::int64_t vocab_size = 0;
  std::int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  RopeConfig rope;
  bool tie_word_embeddings = false;          // lm_head is embed_tokens
  bool attention_bias = false;               // q_proj, k_proj, v_proj have a bias
  bool attention_output_bias = false;        // so has o_proj
  bool mlp_bias = false;                     // and gate_proj, up_proj, down_proj
  bool qk_norm = false;                      // RMS norm of every query and key head before the rotation (Qwen3)
  std::vector<std::int64_t> sliding_window;  // [num_layers]: keys that a token sees, itself included; 0: all before it
  std::vector<std::int32_t> eos_token_ids;   // generation_config.json's, if it has any

  /// `directory` holds config.json. Throws ModelLoadError for a field that is missing or makes no sense, Unsupported
  /// for one that this version cannot honour; both name the file, the field, what came and what was wanted.
  static ModelConfig load(const std::string& directory);
  /// `source` begins every message; `generation_config` may be null.
  static ModelConfig parse(const Json& config, const Json* generation_config, const std::string& source);
};

}  // namespace flexcore
