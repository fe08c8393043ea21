#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "flexcore/config.h"

namespace flexcore {

/// One request of a trace.
struct SimulatedRequest {
  double arrival_ms = 0.0;
  std::int64_t prompt_tokens = 1;
  std::int64_t output_tokens = 1;
  std::string slo_class = {};
};

/// A finetuning job over examples of these lengths, again and again.
struct SimulatedJob {
  std::vector<std::int64_t> lengths;
  std::int64_t batch_size = 8;  // examples of one optimizer step
  double weight = 1.0;
};

struct SimulationConfig {
  /// Of it: max_num_seqs, max_num_batched_tokens, block_size, slo, slo_classes, policy, min_finetune_share, seed.
  EngineConfig engine;
  std::int64_t num_layers = 30;
  std::int64_t num_blocks = 4096;  // pages
  std::int64_t max_finetune_tokens_in_flight = 1024;
  /// How long a step takes, ms a unit, by the names in Engine::stats() after "step_time_ms."; what is left out is 0.
  std::map<std::string, double> step_time_ms;
  double noise = 0.0;        // standard deviation of the logarithm of a step's time
  double stall_share = 0.0;  // of steps that take stall_ms longer
  double stall_ms = 0.0;
  double between_steps_ms = 0.0;  // that no step's time holds
  double optimizer_ms = 0.0;      // after the last sequence of a batch
  double duration_ms = 60'000.0;  // finetuning ends then; requests that came before are served to their end
};

struct SimulatedAnswer {
  std::vector<double> token_ms;  // when each token came, on the trace's clock
  bool kept = false;             // both objectives
};

struct SimulatedStep {
  double begin_ms = 0.0, elapsed_ms = 0.0, predicted_ms = 0.0, predicted_upper_ms = 0.0, budget_ms = 0.0;
  std::int64_t decode_rows = 0, prefill_tokens = 0, finetune_tokens = 0, backward_layer_tokens = 0;
  std::int64_t running = 0, waiting = 0;
  bool floor = false;  // finetuning got a piece in spite of its budget
};

struct Simulation {
  std::vector<SimulatedAnswer> answers;  // one a request
  std::vector<SimulatedStep> steps;
  double end_ms = 0.0;
  double finetune_tokens = 0.0;        // forward, until duration_ms
  double backward_layer_tokens = 0.0;  // likewise
  double trained_tokens = 0.0;         // of sequences that were through, likewise
  std::int64_t optimizer_steps = 0;
  std::int64_t blocks_free = 0;  // at the end
};

/// Runs the engine's scheduler with a virtual clock: what a machine would do with this traffic. The scheduler knows
/// step_time_ms at the start and corrects it as it does in the engine. Same arguments, same result. Requests in order
/// of arrival. Throws InvalidArgument.
Simulation simulate(const std::vector<SimulatedRequest>& requests, const std::vector<SimulatedJob>& jobs,
                    const SimulationConfig& config = {});

}  // namespace flexcore
