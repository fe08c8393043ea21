#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "sched/block_manager.h"
#include "sched/cost_model.h"
#include "sched/plan.h"

namespace flexcore {

struct SchedulerConfig {
  std::int64_t max_num_seqs = 64;             // running sequences, training ones included
  std::int64_t max_num_batched_tokens = 512;  // rows of a forward pass, and of one backward unit
  std::int64_t num_layers = 0;
  double tpot_ms = 100.0;
  double ttft_ms = 2000.0;
  std::int64_t max_finetune_tokens_in_flight = 1024;  // over all jobs; one sequence may always run
};

/// Decides what one iteration does. Inference first: decode rows, then prefill chunks; then finetuning, forward windows and backward units, up to the
/// step time that the objective leaves (FlexLLM section 6.2). Holds pointers to sequences that the engine owns. Same input, same plan.
class Scheduler {
 public:
  Scheduler(const SchedulerConfig& config, BlockManager& blocks, CostModel& cost);

  void set_objective(double tpot_ms, double ttft_ms);

  void add(Sequence* sequence);      // waits for admission
  void finish(Sequence* sequence);   // ended or cancelled: gives its pages back at once, waiting or running

  /// A job gets finetuning time in proportion to its weight. Paused jobs keep what is in flight but get no work.
  void add_job(std::int64_t job_id, double weight);
  void pause_job(std::int64_t job_id, bool paused);
  void remove_job(std::int64_t job_id);  // forgets its sequences and gives their pages back
  /// Sequences of one optimizer step, in order. They start when there is room in flight and in the pool.
  void add_training(TrainSequence* sequence);

  /// Allocates pages, so a plan must be carried out or its engine closed. Updates nothing else: see commit.
  StepPlan plan(double now_ms);
  /// The plan was executed: advances num_computed_tokens, forward_done, layer, rows_left; registers full blocks in the prefix cache;
  /// gives back pages of training sequences that are done (done is set). Call before sampled tokens are appended.
  void commit(const StepPlan& plan);

  bool has_inference() const;
  bool has_training() const;  // any job that is not paused has sequences to work on
  std::int64_t num_waiting() const;
  std::int64_t num_running() const;
};

}  // namespace flexcore
