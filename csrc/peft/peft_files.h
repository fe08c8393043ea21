#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/file.h"
#include "flexcore/config.h"

namespace flexcore {

/// The two matrices of one linear.
struct LoraWeights {
  std::string module;  // path without PEFT's prefix: "model.layers.0.self_attn.q_proj"
  std::int64_t rank = 0;
  std::int64_t in_features = 0;
  std::int64_t out_features = 0;
  std::vector<float> lora_a;  // [rank, in_features]
  std::vector<float> lora_b;  // [out_features, rank]
};

/// A PEFT directory in memory.
struct PeftAdapter {
  LoraConfig config;
  double lora_dropout = 0.0;  // inactive when serving; flexcore does not train with dropout
  std::string base_model;     // base_model_name_or_path, or ""
  std::vector<LoraWeights> modules;
};

/// Name of a tensor in adapter_model.safetensors. `factor` is 'A' or 'B'.
std::string peft_tensor_name(std::string_view module, char factor);

/// Reads adapter_config.json and adapter_model.safetensors, complete and finite, with ranks as the config says. Throws
/// ModelLoadError for damage; Unsupported, by name and value, for every option that would change the result and is not
/// LoRA as above; InvalidArgument for regular expressions.
PeftAdapter read_peft(const std::string& directory);

/// Writes the directory, all files or none; other files in it stay. PEFT 0.11 and later read it.
void write_peft(const std::string& directory, const LoraConfig& config, std::span<const LoraWeights> modules,
                const std::string& base_model = "");
/// The same, among other files of one commit.
void write_peft(AtomicDirectory& output, const LoraConfig& config, std::span<const LoraWeights> modules,
                const std::string& base_model = "");

}  // namespace flexcore
