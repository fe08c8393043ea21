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
  std::string choice;                // "kept", "offloaded", "rebuilt", "recomputed", "in kv_pages", "dropped"
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

/// A model over several devices: a plan, checked by simulation. An engine runs on one.
struct ParallelOptions {
  std::int64_t tensor_parallel_size = 1;  // ranks
  bool sequence_parallel = false;         // the residual stream and its norms split over tokens (arXiv 2205.05198)
  ParallelRates rates = {};
};

/// One way of computing a bypass on the ranks, that no other one dominates.
struct ParallelCandidate {
  std::string plan;  // states in order: "x|k A|in u+ B= y+, back y= u= x|k"; "u+>=" where one is moved
  double forward_us = 0, backward_us = 0;  // of a pass of max_num_batched_tokens
  double step_us = 0;                      // once an optimizer step
  double bytes_per_token = 0;              // sent by a rank, forward and backward
  std::int64_t memory_bytes = 0;           // of a rank: parameters, gradients, optimizer state, saved activations
};

/// What was decided for the bypasses at one kind of linear. Bytes are of one of them and of the rank with the most.
struct ParallelSite {
  std::string module;           // "q_proj"
  std::int64_t count = 0;       // of them
  std::string weight, x, y;     // the linear's own states: "|in", "|k", "+>="
  std::int64_t candidates = 0;  // legal plans
  std::int64_t equal = 0;       // of them, that cost what one in `kept` costs; the rest cost more
  std::string plan;             // the one chosen
  std::string reason;           // the same in words
  double forward_bytes_per_token = 0, backward_bytes_per_token = 0;  // sent by a rank
  std::int64_t step_bytes = 0;                                       // likewise, an optimizer step
  std::int64_t parameter_bytes = 0;
  std::vector<ParallelCandidate> kept;  // no other dominates them; the chosen one first
};

/// Dependent parallelization (FlexLLM, arXiv 2402.18789, section 5.1): the backbone's plan is Megatron-LM's, and every
/// bypass takes the one of all legal plans that costs least. Memory is of the rank that has the most.
struct ParallelPlan {
  std::int64_t tensor_parallel_size = 1;
  bool sequence_parallel = false;
  double forward_bytes_per_token = 0, backward_bytes_per_token = 0;  // sent by a rank for the backbone's layers
  std::int64_t weights = 0, kv_pages = 0, saved_activations = 0, adapters = 0, gradients = 0, optimizer = 0;
  std::vector<ParallelSite> sites;
  std::int64_t total() const { return weights + kv_pages + saved_activations + adapters + gradients + optimizer; }
};

/// Bytes before any allocation: what an engine may take while it serves and one job trains an adapter, on sequences of
/// at most `sequence_length` tokens. What these keep for their backward is in pages of the pool: kv_pages is the rest
/// of it, when as many tokens are in flight as may be. Adapters are counted twice: a version, and the next in the
/// making. Requests that still run on an older version keep that one too.
struct MemoryPlan {
  std::int64_t weights = 0, kv_pages = 0, saved_activations = 0, adapters = 0, gradients = 0, optimizer = 0,
               workspace = 0;
  /// Page-locked host memory, which total() leaves out: what training keeps there, and the rest of it.
  std::int64_t offloaded_activations = 0, swap_space = 0;
  std::int64_t num_layers = 0, sequence_length = 0;
  std::int64_t tokens_in_flight = 0;     // of training sequences at once, as scheduler and pool limit them
  std::int64_t max_sequence_length = 0;  // the longest one that pool and finetune_memory_bytes would hold
  std::int64_t saved_bytes_per_token_per_layer = 0;
  std::int64_t unpruned_bytes_per_token_per_layer = 0;  // if every forward tensor were kept
  std::vector<PlannedTensor> tensors;                   // of one decoder layer
  std::optional<ParallelPlan> parallel;                 // with a tensor_parallel_size above 1
  std::int64_t total() const {
    return weights + kv_pages + saved_activations + adapters + gradients + optimizer + workspace;
  }
  std::string describe() const;  // a table for a terminal
};

/// The memory table of an engine on `model` with `config`, finetuning with `adapter`, without loading weights. With
/// `parallel`, also what every rank of a tensor-parallel group would have and send.
MemoryPlan plan(const std::string& model, const EngineConfig& config, const std::optional<AdapterConfig>& adapter = {},
                std::int64_t sequence_length = 1024, const ParallelOptions& parallel = {});

}  // namespace flexcore
