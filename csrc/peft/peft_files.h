#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"
#include "flexcore/config.h"
#include "peft/layout.h"

namespace flexcore {

/// An array of a PEFT file; its name there is peft_key.
struct AdapterTensor {
  AdapterArray array;  // the offset says nothing
  std::vector<float> values;
};

/// A PEFT directory in memory.
struct PeftAdapter {
  AdapterConfig config;
  std::string base_model;  // base_model_name_or_path, or ""
  std::vector<AdapterTensor> tensors;

  const AdapterTensor* find(const std::string& module, const std::string& suffix) const;
};

/// Reads adapter_config.json and adapter_model.safetensors, complete and finite, with ranks as the config says. Throws
/// ModelLoadError for damage; Unsupported, by name and value, for every method that is none of AdapterConfig's and
/// every option that would change the result; InvalidArgument for regular expressions.
PeftAdapter read_peft(const std::string& directory);

/// Writes the directory, all files or none; other files in it stay. PEFT 0.11 and later read LoRA, DoRA and (IA)^3 from
/// it; for bottleneck adapters names are those of LLM-Adapters (arXiv 2304.01933), whose PEFT has them.
void write_peft(const std::string& directory, const AdapterConfig& config, std::span<const AdapterTensor> tensors,
                const std::string& base_model = "");
/// The same, among other files of one commit.
void write_peft(AtomicDirectory& output, const AdapterConfig& config, std::span<const AdapterTensor> tensors,
                const std::string& base_model = "");

}  // namespace flexcore
