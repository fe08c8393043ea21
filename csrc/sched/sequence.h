#pragma once

#include <cstdint>
#include <vector>

#include "flexcore/config.h"
#include "sched/block_manager.h"
#include "sched/cost_model.h"
#include "sched/search.h"

namespace flexcore {

/// An inference request as the scheduler sees it. The engine owns it and appends to `tokens` what was sampled.
struct Sequence {
  enum class State : std::uint8_t { kWaiting, kRunning, kFinished };

  std::int64_t id = 0;
  std::vector<std::int32_t> tokens;  // prompt, then generated
  std::int64_t num_prompt_tokens = 0;
  std::int64_t num_computed_tokens = 0;  // keys and values of tokens[0, num_computed) are in pages
  std::int64_t num_cached_tokens = 0;    // of the prompt, found in the prefix cache
  std::int64_t max_total_tokens = 0;     // prompt + max_tokens, clipped to the model
  std::vector<std::int32_t> block_table;
  std::uint64_t cache_key = 0;  // (adapter, version): prefixes are shared only within one key
  bool use_prefix_cache = true;
  State state = State::kWaiting;
  std::int64_t slo_class = 0;  // whose objective it is promised
  double arrival_ms = 0.0;
  double first_step_ms = -1.0;   // begin of the first step that works on it; < 0: it waits
  double first_token_ms = -1.0;  // time of the first generated token; < 0: none yet
  double last_token_ms = -1.0;   // of the newest

  std::int64_t num_generated() const { return static_cast<std::int64_t>(tokens.size()) - num_prompt_tokens; }
};

/// Which parts of its objective a request keeps, by the tokens that it has.
struct Kept {
  bool ttft, tpot;
};
inline Kept kept(const Sequence& sequence, const SLO& slo) {
  const auto gaps = static_cast<double>(sequence.num_generated() - 1);
  return {.ttft = sequence.first_token_ms - sequence.arrival_ms <= slo.ttft_ms,
          .tpot = sequence.last_token_ms - sequence.first_token_ms <= slo.tpot_ms * gaps};
}

/// A training sequence in flight. It goes forward through all layers window by window, then backward layer by layer,
/// windows right to left.
struct TrainSequence {
  std::int64_t id = 0;
  std::int64_t job_id = 0;
  std::int64_t program = 0;                 // units are batched only among sequences of one compiled backward
  std::int64_t length = 0;                  // tokens
  std::int64_t first_layer = 0;             // lowest layer that has a backward
  std::int64_t window_tokens = 0;           // largest forward window; 0: any
  std::int64_t backward_window_tokens = 0;  // largest backward window; 0: any
  double backward_cost = 1.0;               // of its units, in units that make nothing again
  double host_blocks_per_token = 0.0;       // pages' worth that all its layers keep in host memory, one way
  std::int64_t store_blocks = 0;            // pages that hold what it keeps for its backward
  std::int64_t host_store_blocks = 0;       // and those in host memory
  std::vector<std::int32_t> block_table;
  BlockRun store, host_store;
  std::vector<std::int32_t> host_table;  // where what was on the device is while it is swapped out
  double stay_ms = 0.0;                  // of work, before a backward that came back is swapped out again
  double waited_ms = 0.0;                // of finetuning's time, that were too short for its way back

  bool started = false;           // pages and saved activations are held
  std::int64_t forward_done = 0;  // tokens [0, forward_done) are through the forward
  std::int64_t layer = 0;         // backward: layer in work; starts at num_layers - 1 when the forward is done
  std::int64_t rows_left = 0;     // backward: rows [0, rows_left) of `layer` are to do
  bool in_backward() const { return forward_done == length; }
  bool swapped_out() const { return !host_table.empty(); }
  bool done = false;  // backward finished down to first_layer
};

/// Its rows [begin, end), in a forward window or in a unit of one of `num_layers` layers, as part of a step.
inline void add_forward(StepFeatures& f, const TrainSequence& sequence, std::int64_t begin, std::int64_t end) {
  f.finetune_tokens += end - begin;
  f.finetune_context += context_sum(begin, end);
  f.host_blocks += static_cast<double>(end - begin) * sequence.host_blocks_per_token;
}
inline void add_backward(StepFeatures& f, const TrainSequence& sequence, std::int64_t begin, std::int64_t end,
                         std::int64_t num_layers) {
  const auto rows = static_cast<double>(end - begin);
  f.backward_layer_tokens += end - begin;
  f.backward_layer_context += context_sum(begin, end);
  f.recomputed_layer_tokens += rows * (sequence.backward_cost - 1.0);
  f.host_blocks += rows * sequence.host_blocks_per_token / static_cast<double>(num_layers - sequence.first_layer);
}

}  // namespace flexcore
