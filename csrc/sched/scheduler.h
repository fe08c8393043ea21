#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "flexcore/config.h"
#include "sched/block_manager.h"
#include "sched/cost_model.h"
#include "sched/plan.h"
#include "sched/policy.h"

namespace flexcore {

struct SchedulerConfig {
  std::int64_t max_num_seqs = 64;             // running sequences, training ones included (they take at most half)
  std::int64_t max_num_batched_tokens = 512;  // rows of a forward pass, and of one backward unit
  std::int64_t num_layers = 0;
  std::vector<SLO> objectives = {SLO{}};              // by Sequence::slo_class
  std::string policy = "hybrid";                      // policy.h
  std::int64_t max_finetune_tokens_in_flight = 1024;  // over all jobs; one sequence may always run

  std::int64_t min_prefill_tokens = 32;   // no step's prefill is cut below this when a first token is due
  std::int64_t min_finetune_tokens = 16;  // no window is cut below this: each costs a pass over weights
  double min_finetune_share = 0.02;       // of the time, whatever the objectives; in minimal pieces
  double max_idle_step_ms = 500.0;        // longest step while no request is there

  std::int64_t max_training_seqs() const { return std::max<std::int64_t>(1, max_num_seqs / 2); }
  /// The most tokens in flight when every training sequence has at most `length`.
  std::int64_t finetune_tokens_in_flight(std::int64_t length) const {
    return std::max(length, std::min(max_finetune_tokens_in_flight, length * max_training_seqs()));
  }
};

struct StepLimits;

/// Decides what one iteration does. Inference first: decode rows, then prefill chunks; then finetuning, forward windows
/// and backward units, as much as the policy allows: with the hybrid one, up to the step time that the objectives of
/// the requests leave. Holds pointers to sequences that the engine owns. Same input, same plan. Not thread-safe.
///
/// Pages. A request takes the pages of all its tokens at admission, then one at a time; a training sequence takes at
/// its start all of its pages, and a run of others for what it keeps for its backward, in host memory too if it keeps
/// some of it there. When they run out: training sequences in their forward phase give theirs back first, then those in
/// their backward phase, if there are host pages and there is so much left to do that the way there and back is
/// shorter; then the youngest request is preempted. A forward is done again (plan.restarted) or goes to host pages
/// (plan.swapped), whichever takes less time. Backward phases that stay keep their pages, and run until they are done.
class Scheduler {
 public:
  /// Throws InvalidArgument on a limit below 1, an objective that is not positive, an unknown policy.
  Scheduler(const SchedulerConfig& config, BlockManager& blocks, CostModel& cost);

  /// Of a class that exists, or of the next one. Holds from the next plan on, for running requests too.
  void set_objective(std::int64_t slo_class, const SLO& slo);
  /// From the next plan on. Throws InvalidArgument.
  void set_policy(const std::string& policy) { policy_ = make_policy(policy); }
  void set_finetune_tokens_in_flight(std::int64_t tokens) { config_.max_finetune_tokens_in_flight = tokens; }
  std::span<const SLO> objectives() const { return config_.objectives; }

  /// Waits for admission. Throws InvalidArgument when it has no tokens, OutOfMemory when the pool could never hold it.
  void add(Sequence* sequence);
  /// Ended or cancelled: gives its pages back at once, waiting or running. Nothing happens the second time.
  void finish(Sequence* sequence);

  /// A job gets finetuning time in proportion to its weight. Paused jobs keep what is in flight but get no work, unless
  /// everything else would stand still because of the pages that they hold.
  void add_job(std::int64_t job_id, double weight);
  void pause_job(std::int64_t job_id, bool paused);
  void remove_job(std::int64_t job_id);  // forgets its sequences and gives their pages back
  /// Sequences of one optimizer step, in order. They start when there is room in flight and in the pool. Throws as add.
  void add_training(TrainSequence* sequence);

  /// A run of pages; those in the way are moved, and every table says so. As BlockManager::reserve_run.
  BlockRun reserve_run(std::int64_t count, std::vector<BlockMove>& moves, Tier tier = Tier::kDevice);

  /// Allocates pages and sets state, started and cached tokens of what it admits, starts, preempts or restarts; the
  /// rest is updated by commit. At most one forward window a sequence. Without its commit, the next plan asks for the
  /// same work again.
  StepPlan plan(double now_ms);
  /// The plan was executed: advances num_computed_tokens, forward_done, layer, rows_left; registers full blocks in the
  /// prefix cache; gives back pages of training sequences that are done (done is set). Call before sampled tokens are
  /// appended. What was finished or removed since the plan is passed over.
  void commit(const StepPlan& plan);

  bool has_inference() const { return !running_.empty() || !waiting_.empty(); }
  bool has_training() const;  // any job that is not paused has sequences to work on
  std::int64_t num_waiting() const { return static_cast<std::int64_t>(waiting_.size()); }
  std::int64_t num_running() const { return static_cast<std::int64_t>(running_.size()); }

 private:
  struct Job {
    std::int64_t id = 0;
    double weight = 1.0;
    bool paused = false;
    bool idle = true;                       // had nothing to do at the last plan
    double service = 0.0;                   // predicted ms given, divided by weight
    std::vector<TrainSequence*> sequences;  // in order, those that are done left out
    // Of the plan in the making:
    bool forward_work = false;    // some sequence is not through its forward
    bool forward_closed = false;  // no (more) window fits
    bool exhausted = false;       // nothing fits
    std::int64_t windows = 0;     // forward windows given
  };
  /// A started training sequence as the plan in the making will leave it.
  struct Flight {
    TrainSequence* sequence;
    std::size_t job;
    std::int64_t layer, rows;  // backward position; rows 0: not in backward, or done
    bool used = false;         // has a forward window in this plan
  };
  struct Rows {
    std::size_t flight;
    std::int64_t count;
  };
  struct Step {
    StepPlan& plan;
    std::int64_t rows_left;          // of the forward pass
    std::int64_t rows_for_finetune;  // of those, kept from prefill for a starved job
    bool first_token_due = false;    // somebody's time to the first token is at stake
    double prefill_budget_ms = 0.0;
    double finetune_budget_ms = 0.0;       // of the whole step
    std::int64_t finetune_layer_rows = 0;  // that the policy allows: a forward row counts once a layer
    bool serves = true;                    // requests get something
    bool starved = false;                  // finetuning has had less than its floor
    bool holds_admission = false;          // so that it finds a slot and pages
    bool short_of_pages = false;           // a decode row found no page: nobody is admitted or started
    bool blocked = false;                  // a waiting request found no slot or no pages
    bool drain = false;                    // what is missing is held by backward phases: run only those
    bool stuck = false;                    // nothing was planned: one piece runs whatever its time, paused jobs' too
    bool waking = false;                   // the backward phases of paused jobs run
    bool short_of_runs = false;            // runs of others keep a sequence from starting: nobody else starts
    bool short_of_host_runs = false;       // or pages in host memory: nobody starts but who comes back from there
    bool held_by_paused = false;           // and all of these are of paused jobs
    bool host_held = false;                // in host memory: what was swapped out there comes back to be worked off
  };
  enum class Outcome : std::uint8_t { kGiven, kNoFit, kNothing };

  // scheduler.cpp: life cycle and inference
  Job& job(std::int64_t job_id, const char* op);
  void release(TrainSequence& sequence);
  struct BlocksHeld {
    std::int64_t yielding = 0, staying = 0;  // by training sequences that would give them to requests, and by others
  };
  BlocksHeld blocks_held();
  double swap_ms(const TrainSequence& sequence) const;
  bool backward_yields(const TrainSequence& sequence, std::int64_t free_host_blocks);
  enum class Yielding : std::uint8_t { kAny, kPaused, kPausedForwards };
  bool yield_one(StepPlan& plan, Yielding who);
  Yielding whom_for(const TrainSequence& sequence);
  void restart(StepPlan& plan, TrainSequence& sequence);
  void preempt(StepPlan& plan, Sequence* sequence);
  bool reserve_decode(Step& step, Sequence& sequence);
  bool make_room(Step& step, std::int64_t missing_blocks);
  std::int64_t prefill_chunk(const Step& step, std::int64_t begin, std::int64_t end) const;
  void add_work(Step& step, Sequence& sequence, std::int64_t count, bool decode);
  void plan_inference(Step& step);
  void plan_decode(Step& step);
  void plan_prefill(Step& step);
  double idle_ms() const;
  bool first_token_is_due(double now_ms) const;
  std::int64_t commit_backward(const BackwardUnit& unit);

  // scheduler_finetune.cpp
  void begin_jobs(Step& step);
  void plan_finetune(Step& step, Load load, const StepLimits& limits);
  double least_piece_ms() const;
  void fill(Step& step);
  Job* neediest(const Step& step);
  Outcome give(Step& step, Job& job, bool force);
  Outcome give_forward(Step& step, Job& job, bool force);
  Outcome give_backward(Step& step, Job& job, bool force);
  Outcome swap_in(Step& step, Job& job, bool force);
  bool start(Step& step, TrainSequence& sequence);
  void add_flight(TrainSequence& sequence);
  bool take_stores(Step& step, TrainSequence& sequence);
  bool take_run(Step& step, const TrainSequence& sequence, BlockRun& run, std::int64_t count, Tier tier);
  bool give_back_host(Step& step);
  bool room_to_start(Step& step, const TrainSequence& sequence, bool force);
  std::int64_t growth_blocks(std::int64_t tokens) const;
  std::int64_t forward_rows(const Step& step, const TrainSequence& sequence, bool force) const;
  std::int64_t backward_rows(const Flight& flight, std::int64_t limit) const;
  std::int64_t least_rows() const;
  std::int64_t without_sliver(std::int64_t rows, std::int64_t available) const;
  bool may_join(const Step& step, const Job& job) const;
  StepFeatures collect(const Step& step, const Job& job, std::int64_t program, std::int64_t layer, std::int64_t limit);
  bool fits(const Step& step, const StepFeatures& features) const;
  void charge(Job& job, double ms);

  SchedulerConfig config_;
  std::unique_ptr<Policy> policy_;
  double owed_ms_ = 0.0;  // to finetuning, from its floor
  BlockManager& blocks_;
  CostModel& cost_;
  std::deque<Sequence*> waiting_;
  std::vector<Sequence*> running_;  // in order of arrival; all of them arrived before those that wait
  std::vector<Job> jobs_;
  std::vector<TrainSequence*> started_;  // in order of start
  std::vector<Flight> flights_;          // of the plan in the making
  std::vector<Rows> unit_;               // of the unit in the making
};

}  // namespace flexcore
