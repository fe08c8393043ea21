#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "sched/cost_model.h"
#include "sched/sequence.h"

namespace flexcore {

/// Tokens [begin, end) of a request go through the model; the last row gives a token when it is the newest.
struct SequenceWork {
  Sequence* sequence = nullptr;
  std::int64_t begin = 0, end = 0;
  bool sample = false;
  bool decode = false;  // one row, and the request has produced a token before
};

/// Tokens [begin, end) of a training sequence: a forward window, or the rows of a backward unit.
struct TrainWindow {
  TrainSequence* sequence = nullptr;
  std::int64_t begin = 0, end = 0;
  double predicted_ms = 0.0;  // its share of the step
};

/// One layer's backward for windows of several sequences with the same program.
struct BackwardUnit {
  std::int64_t program = 0;
  std::int64_t layer = 0;
  std::vector<TrainWindow> windows;
};

/// What one iteration does.
struct StepPlan {
  std::vector<SequenceWork> inference;
  std::vector<TrainWindow> forward;
  std::vector<BackwardUnit> backward;     // in order of execution, after the forward
  std::vector<Sequence*> preempted;       // gave their pages back; will be recomputed
  std::vector<TrainSequence*> restarted;  // gave their pages back, and what they kept in them is lost
  std::vector<TrainSequence*> swapped;    // gave their pages back, and what they kept in them is in host memory
  std::vector<TrainSequence*> started;    // took pages, their first or, after they were swapped, others
  std::vector<BlockMove> moves;           // of pages, in order, before anything else
  StepFeatures features;
  double predicted_ms = 0.0;
  double predicted_upper_ms = 0.0;  // with the margin
  double finetune_ms = 0.0;         // of it, for finetuning, its ways back from host memory among it
  double budget_ms = 0.0;           // that finetuning was to keep
  bool floor = false;               // a piece was given in spite of it
  bool counts_for_floor = false;    // finetuning had work, and the policy has a floor
  std::string reason;               // for the budget, where there is more to say than the objective
  std::string explain;              // "decode 12, prefill 0, s=48, units 6: predicted 41.2 of 45 ms"

  /// Of the moves, those from and to host memory.
  std::int64_t blocks_swapped(std::int64_t num_blocks) const {
    return std::count_if(moves.begin(), moves.end(),
                         [&](const BlockMove& move) { return (move.from >= num_blocks) != (move.to >= num_blocks); });
  }
  bool empty() const { return inference.empty() && forward.empty() && backward.empty(); }
};

}  // namespace flexcore
