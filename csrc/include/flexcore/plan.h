#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flexcore/config.h"

namespace flexcore {

/// What the compiler decided for one forward tensor that the backward reads.
struct PlannedTensor {
  std::string name;                  // "attention_norm.y", "q", "gate", ...
  std::string choice;                // "kept", "rebuilt", "in kv_pages", "dropped"
  std::string reason;                // one line
  std::int64_t bytes_per_token = 0;  // of one layer
};

/// What the devices and links of a tensor-parallel group are taken to do. The defaults are those of an H100 SXM, as
/// NVIDIA's data sheet "H100 Tensor Core GPU" has them; measured rates give better plans.
struct ParallelRates {
  double flops_per_second = 989.4e12;        // bfloat16 without sparsity
  double memory_bytes_per_second = 3.35e12;  // HBM3
  double link_bytes_per_second = 450e9;      // NVLink, one direction: half of the 900 GB/s that count both
  double collective_seconds = 10e-6;         // before the first byte of a collective; assumed, not published
};

/// Bytes before any allocation: what an engine may take while it serves and one job trains an adapter, on sequences of
/// at most `sequence_length` tokens. Adapters are counted twice: a version, and the next in the making. Requests that
/// still run on an older version keep that one too.
struct MemoryPlan {
  std::int64_t weights = 0, kv_pages = 0, saved_activations = 0, adapters = 0, gradients = 0, optimizer = 0,
               workspace = 0;
  std::int64_t num_layers = 0, sequence_length = 0;
  std::int64_t tokens_in_flight = 0;  // of training sequences at once, as the scheduler limits them
  std::int64_t saved_bytes_per_token_per_layer = 0;
  std::int64_t unpruned_bytes_per_token_per_layer = 0;  // if every forward tensor were kept
  std::vector<PlannedTensor> tensors;                   // of one decoder layer
  std::int64_t total() const {
    return weights + kv_pages + saved_activations + adapters + gradients + optimizer + workspace;
  }
  std::string describe() const;  // a table for a terminal
};

/// The memory table of an engine on `model` with `config`, finetuning with `lora`, without loading weights.
MemoryPlan plan(const std::string& model, const EngineConfig& config, const std::optional<LoraConfig>& lora = {},
                std::int64_t sequence_length = 1024);

}  // namespace flexcore
