// The finetuning half of the scheduler: what fills a step after inference.

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "sched/scheduler.h"
#include "sched/search.h"
#include "sched/slack.h"

namespace flexcore {
namespace {

// Before the cost model knows anything, jobs are charged by token-layers; a backward pass costs about two forwards.
constexpr double kForwardProxyMs = 1e-3;
constexpr double kBackwardProxyMs = 2e-3;
// A training sequence starts only when every running request has room for so many more tokens.
constexpr std::int64_t kGrowthTokens = 64;
constexpr double kDeepDebt = 4.0;  // pieces

StepFeatures with_forward(StepFeatures f, const TrainSequence& sequence, std::int64_t begin, std::int64_t end) {
  add_forward(f, sequence, begin, end);
  return f;
}

}  // namespace

void Scheduler::begin_jobs(Step& step) {
  step.starved = cost_.fitted() && has_training() && owed_ms_ > 0.0 && owed_ms_ >= least_piece_ms();
  double least_service = std::numeric_limits<double>::infinity();
  const auto has_work = [](const Job& j) { return !j.paused && !j.sequences.empty(); };
  for (const Job& j : jobs_)
    if (has_work(j) && !j.idle) least_service = std::min(least_service, j.service);
  for (Job& j : jobs_) {
    // Who comes back starts level with the others: time not asked for is not owed.
    if (has_work(j) && j.idle && least_service < std::numeric_limits<double>::infinity())
      j.service = std::max(j.service, least_service);
    j.idle = !has_work(j);
    j.forward_closed = j.exhausted = false;
    j.windows = 0;
    const auto in_forward = std::find_if(j.sequences.begin(), j.sequences.end(),
                                         [](const TrainSequence* s) { return !s->in_backward() || s->swapped_out(); });
    j.forward_work = in_forward != j.sequences.end();
    if (j.paused || !j.forward_work || !step.starved) continue;
    // Slots and pages too, when it has none or what it has in flight is not enough to catch up.
    const bool short_of_sequences = started_.empty() || owed_ms_ > kDeepDebt * least_piece_ms();
    const TrainSequence& next = **in_forward;
    const bool room = blocks_.blocks_for(next.length) + next.store_blocks <= blocks_.num_free() &&
                      (next.host_store || next.host_store_blocks <= blocks_.num_free_host());
    if (short_of_sequences && (!running_.empty() || room)) step.holds_admission = true;
    // Prefill leaves rows to a job, so that its piece fits.
    const std::int64_t window = std::max((*in_forward)->window_tokens, least_rows());
    const std::int64_t most = config_.max_num_batched_tokens / 2;
    step.rows_for_finetune = std::max(step.rows_for_finetune, std::min(window, most));
  }
}

/// What the floor has to have saved up for: one minimal window beside requests.
double Scheduler::least_piece_ms() const {
  const StepFeatures beside{.decode_rows = 1, .sampled_rows = 1};
  return cost_.predict_ms(with_forward(beside, TrainSequence{}, 0, least_rows())) - cost_.predict_ms(beside);
}

void Scheduler::plan_finetune(Step& step, Load load, const StepLimits& limits) {
  flights_.clear();
  for (TrainSequence* sequence : started_) add_flight(*sequence);
  // When only paused jobs could give the pages, the others go on meanwhile; they start nothing new, so that this ends.
  step.drain = step.drain && std::any_of(flights_.begin(), flights_.end(), [&](const Flight& flight) {
                 return flight.rows > 0 && !jobs_[flight.job].paused;
               });
  load.inference_rows = config_.max_num_batched_tokens - step.rows_left;
  load.limit_ms = limits.finetune_ms;
  const auto tpot = [&](const Sequence* s) {
    return config_.objectives[static_cast<std::size_t>(s->slo_class)].tpot_ms;
  };
  for (const Sequence* sequence : running_)
    if (sequence->num_generated() == 0) load.limit_ms = std::min(load.limit_ms, tpot(sequence));
  if (!waiting_.empty()) load.limit_ms = std::min(load.limit_ms, tpot(waiting_.front()));
  const bool due = !step.drain && step.first_token_due;
  if (due) load.limit_ms = 0.0;

  const Allowance allowance = policy_->allowance(load);
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  step.finetune_budget_ms = allowance.step_ms - cost_.swap_ms(step.plan.blocks_swapped(blocks_.num_blocks()));
  step.finetune_layer_rows =
      allowance.tokens > kMost / config_.num_layers ? kMost : allowance.tokens * config_.num_layers;
  step.starved = step.starved && allowance.floor;
  step.plan.budget_ms = allowance.step_ms;
  step.plan.counts_for_floor = allowance.floor && load.training;
  if (!step.serves)
    step.plan.reason = "requests wait";
  else if (!load.inference)
    step.plan.reason = "nobody waits";
  else if (due)
    step.plan.reason = "a first token is due";
  else if (limits.tightest != nullptr && limits.slack_ms < 0.0)
    step.plan.reason = str("request ", limits.tightest->id, " is ", std::lround(-limits.slack_ms), " ms behind");
  const bool none = allowance.tokens == 0;
  if (!none) fill(step);
  // Who gets nothing is still worked off when requests can do nothing for want of its pages.
  if (step.plan.empty() && (has_inference() || (has_training() && !none))) {
    step.drain = step.drain || none;
    step.stuck = true;
    for (Job& j : jobs_) j.forward_closed = j.exhausted = false;
    fill(step);
  }
}

void Scheduler::fill(Step& step) {
  bool first_in_line = true, may_force = true;
  double owed_ms = owed_ms_;
  while (Job* next = neediest(step)) {
    // Paused jobs run for the pages that they hold, not beside others.
    if (next->paused && !step.plan.empty() && !step.waking && !step.held_by_paused) return;
    step.waking = next->paused;
    Outcome outcome = give(step, *next, false);
    const bool starved = first_in_line && (step.drain || step.starved);
    const bool forced = outcome != Outcome::kGiven && may_force && (starved || step.stuck);
    if (forced) {
      const double before_ms = cost_.predict_ms(step.plan.features);
      outcome = give(step, *next, true);
      step.plan.floor = step.plan.floor || outcome == Outcome::kGiven;
      owed_ms -= cost_.predict_ms(step.plan.features) - before_ms;
      if (outcome != Outcome::kNothing)
        may_force = outcome == Outcome::kGiven && step.starved && owed_ms >= least_piece_ms();
    }
    if (outcome != Outcome::kNothing && !(forced && may_force)) first_in_line = false;
    if (outcome != Outcome::kGiven) next->exhausted = true;
  }
}

/// The job with the least service that may still get something; paused ones only when all else is stuck, and last.
Scheduler::Job* Scheduler::neediest(const Step& step) {
  Job* best = nullptr;
  for (Job& j : jobs_) {
    if (j.exhausted || j.sequences.empty() || (j.paused && !step.stuck && !step.held_by_paused)) continue;
    if (best == nullptr || j.paused < best->paused || (j.paused == best->paused && j.service < best->service))
      best = &j;
  }
  return best;
}

/// One piece of work for a job: a forward window if there is any, so that its sequences go backward together.
Scheduler::Outcome Scheduler::give(Step& step, Job& job, bool force) {
  Outcome forward = Outcome::kNothing;
  if (!step.drain && !job.paused && (force || !job.forward_closed)) {
    forward = give_forward(step, job, force);
    if (forward == Outcome::kGiven) return forward;
  }
  if (job.paused && step.host_held) swap_in(step, job, force);
  job.forward_closed = true;
  if (job.windows > 0) return forward;
  const Outcome backward = give_backward(step, job, force);
  return backward == Outcome::kNothing ? forward : backward;
}

Scheduler::Outcome Scheduler::give_forward(Step& step, Job& job, bool force) {
  const auto index = static_cast<std::size_t>(&job - jobs_.data());
  Outcome outcome = swap_in(step, job, force);
  Flight* flight = nullptr;
  std::int64_t count = 0;
  for (Flight& candidate : flights_) {
    if (candidate.job != index || candidate.used || candidate.sequence->in_backward()) continue;
    count = forward_rows(step, *candidate.sequence, force);
    if (count > 0) {
      flight = &candidate;
      break;
    }
    outcome = Outcome::kNoFit;
  }
  if (flight == nullptr) {
    const auto pending =
        std::find_if(job.sequences.begin(), job.sequences.end(), [](const TrainSequence* s) { return !s->started; });
    if (pending == job.sequences.end()) return outcome;
    TrainSequence& sequence = **pending;
    if (sequence.swapped_out()) return outcome;  // nobody overtakes it
    if (!room_to_start(step, sequence, force)) return step.holds_admission && !force ? Outcome::kNoFit : outcome;
    count = forward_rows(step, sequence, force);
    if (count == 0) return Outcome::kNoFit;
    if (!start(step, sequence)) return force ? Outcome::kNothing : Outcome::kNoFit;
    flight = &flights_.back();
  }
  TrainSequence& sequence = *flight->sequence;
  const std::int64_t begin = sequence.forward_done, end = begin + count;
  StepFeatures& f = step.plan.features;
  const double before = cost_.predict_ms(f);
  add_forward(f, sequence, begin, end);
  const double ms =
      cost_.fitted() ? cost_.predict_ms(f) - before : kForwardProxyMs * static_cast<double>(count * config_.num_layers);
  charge(job, ms);
  step.plan.forward.push_back({&sequence, begin, end, ms});
  step.rows_left -= count;
  step.finetune_layer_rows -= std::min(step.finetune_layer_rows, count * config_.num_layers);
  flight->used = true;
  ++job.windows;
  return Outcome::kGiven;
}

/// Brings the job's sequences back from host pages, as far as there is room and time: now, or saved up over steps that
/// had too little. With force one, for a job that has nothing else.
Scheduler::Outcome Scheduler::swap_in(Step& step, Job& job, bool force) {
  const auto index = static_cast<std::size_t>(&job - jobs_.data());
  const auto own = [&](const Flight& flight) { return flight.job == index; };
  if (force && std::any_of(flights_.begin(), flights_.end(), own)) return Outcome::kNothing;
  // What no force helps with leaves it to another job.
  const Outcome no_room = force ? Outcome::kNothing : Outcome::kNoFit;
  for (TrainSequence* sequence : job.sequences) {
    if (!sequence->swapped_out()) continue;
    const double ms = swap_ms(*sequence) / 2.0;
    const double left_ms = step.finetune_budget_ms - cost_.predict_ms(step.plan.features);
    if (!force && has_inference() && left_ms < ms) {
      if (sequence->waited_ms < ms) sequence->waited_ms += std::max(0.0, left_ms);
      if (sequence->waited_ms < ms) return Outcome::kNoFit;
    }
    if (!room_to_start(step, *sequence, force) || !start(step, *sequence)) return no_room;
    blocks_.swap_in(sequence->host_table, sequence->block_table, sequence->store, step.plan.moves);
    sequence->waited_ms = 0.0;
    sequence->stay_ms = 2.0 * ms;
    step.finetune_budget_ms -= ms;
    step.plan.finetune_ms += ms;
    charge(job, ms);
    if (force) break;
  }
  return Outcome::kNothing;
}

/// Who yields for a sequence that starts when nobody else is at work. One of a paused job comes back to be worked off:
/// phases in backward may have work in this plan already.
Scheduler::Yielding Scheduler::whom_for(const TrainSequence& sequence) {
  return job(sequence.job_id, "plan").paused ? Yielding::kPausedForwards : Yielding::kPaused;
}

/// Gives a pending sequence its pages.
bool Scheduler::start(Step& step, TrainSequence& sequence) {
  if (!take_stores(step, sequence)) return false;
  blocks_.reserve(sequence.block_table, sequence.length);
  sequence.started = true;
  started_.push_back(&sequence);
  step.plan.started.push_back(&sequence);
  add_flight(sequence);
  return true;
}

void Scheduler::add_flight(TrainSequence& sequence) {
  const auto owner = static_cast<std::size_t>(&job(sequence.job_id, "plan") - jobs_.data());
  const bool backward = sequence.in_backward();
  flights_.push_back({&sequence, owner, backward ? sequence.layer : 0, backward ? sequence.rows_left : 0});
}

/// Whether a pending sequence may take its pages now. Sequences of paused jobs make room for others when nobody is at
/// work.
bool Scheduler::room_to_start(Step& step, const TrainSequence& sequence, bool force) {
  const bool held_up = step.short_of_runs || (step.short_of_host_runs && !sequence.swapped_out());
  if (step.short_of_pages || held_up || step.blocked || (!waiting_.empty() && step.serves && !force)) return false;
  const std::int64_t pages =
      blocks_.blocks_for(sequence.length) + sequence.store_blocks + growth_blocks(force ? 1 : kGrowthTokens);
  const std::int64_t slots = config_.max_training_seqs();
  const auto room = [&] {
    const auto started = static_cast<std::int64_t>(started_.size());
    std::int64_t in_flight = 0;
    for (const TrainSequence* s : started_) in_flight += s->length;
    return started < slots && started + num_running() < config_.max_num_seqs && pages <= blocks_.num_free() &&
           (started == 0 || in_flight + sequence.length <= config_.max_finetune_tokens_in_flight);
  };
  if (room()) return true;
  for (const TrainSequence* s : started_)
    if (!job(s->job_id, "plan").paused) return false;
  while (yield_one(step.plan, whom_for(sequence))) {
    std::erase_if(flights_, [](const Flight& flight) { return !flight.sequence->started; });
    if (room()) return true;
  }
  return false;
}

/// Runs for what the sequence keeps; who comes back from host memory has that one already.
bool Scheduler::take_stores(Step& step, TrainSequence& sequence) {
  const bool first = !sequence.host_store;
  if (first && !take_run(step, sequence, sequence.host_store, sequence.host_store_blocks, Tier::kHost)) return false;
  if (take_run(step, sequence, sequence.store, sequence.store_blocks, Tier::kDevice)) return true;
  if (first) blocks_.release_run(sequence.host_store);
  return false;
}

/// Where runs of others lie in between it waits for them, and nobody takes more; those of paused jobs, when nobody else
/// is at work, give way or are worked off.
bool Scheduler::take_run(Step& step, const TrainSequence& sequence, BlockRun& run, std::int64_t count, Tier tier) {
  if (count == 0) return true;
  while (true) {
    run = reserve_run(count, step.plan.moves, tier);
    if (run) return true;
    (tier == Tier::kDevice ? step.short_of_runs : step.short_of_host_runs) = true;
    const auto at_work = [&](const Job& j) {
      return !j.paused && std::any_of(j.sequences.begin(), j.sequences.end(), [&](const TrainSequence* s) {
        return s->started || (tier == Tier::kHost && s->swapped_out());
      });
    };
    if (std::any_of(jobs_.begin(), jobs_.end(), at_work)) return false;
    if (tier == Tier::kDevice ? !yield_one(step.plan, whom_for(sequence)) : !give_back_host(step)) {
      step.held_by_paused = true;
      step.host_held = tier == Tier::kHost;
      return false;
    }
    std::erase_if(flights_, [](const Flight& flight) { return !flight.sequence->started; });
  }
}

/// One forward phase of a paused job begins again, for its pages in host memory.
bool Scheduler::give_back_host(Step& step) {
  for (const Job& j : jobs_) {
    for (TrainSequence* sequence : j.sequences) {
      if (!j.paused || sequence->in_backward() || !(sequence->swapped_out() || sequence->host_store)) continue;
      std::erase(started_, sequence);
      restart(step.plan, *sequence);
      return true;
    }
  }
  return false;
}

/// Pages that the running requests will ask for until each has `tokens` more.
std::int64_t Scheduler::growth_blocks(std::int64_t tokens) const {
  std::int64_t sum = 0;
  for (const Sequence* sequence : running_) {
    const auto length = static_cast<std::int64_t>(sequence->tokens.size());
    const std::int64_t target = std::min(length + tokens, std::max(length, sequence->max_total_tokens - 1));
    sum +=
        std::max<std::int64_t>(0, blocks_.blocks_for(target) - static_cast<std::int64_t>(sequence->block_table.size()));
  }
  return sum;
}

/// Rows of the next forward window of `sequence`; 0 when it does not fit.
std::int64_t Scheduler::forward_rows(const Step& step, const TrainSequence& sequence, bool force) const {
  const std::int64_t begin = sequence.forward_done, remaining = sequence.length - begin;
  const auto in_time = [&](std::int64_t count) {
    return fits(step, with_forward(step.plan.features, sequence, begin, begin + count));
  };
  const std::int64_t rows = std::min(step.rows_left, step.finetune_layer_rows / config_.num_layers);
  if (sequence.window_tokens > 0) {
    const std::int64_t window = std::min({sequence.window_tokens, remaining, config_.max_num_batched_tokens});
    if (force) return std::min(window, step.rows_left);
    return window <= rows && in_time(window) ? window : 0;
  }
  const std::int64_t high = std::min(remaining, force ? step.rows_left : rows),
                     least = std::min(least_rows(), remaining);
  if (force) return std::min(high, least);
  const std::int64_t count = high < least ? 0 : largest_that(high, in_time);
  return count < least ? 0 : without_sliver(count, remaining);
}

Scheduler::Outcome Scheduler::give_backward(Step& step, Job& job, bool force) {
  const auto index = static_cast<std::size_t>(&job - jobs_.data());
  const Flight* top = nullptr;  // the highest layer first: who is behind catches up, and then they share units
  for (const Flight& flight : flights_)
    if (flight.job == index && flight.rows > 0 && (top == nullptr || flight.layer > top->layer)) top = &flight;
  if (top == nullptr) return Outcome::kNothing;
  const std::int64_t program = top->sequence->program, layer = top->layer;

  const std::int64_t most = std::min(config_.max_num_batched_tokens, step.finetune_layer_rows);
  StepFeatures f = collect(step, job, program, layer, most);
  if (!force && !unit_.empty() && !fits(step, f)) {
    const std::int64_t rows = f.backward_layer_tokens - step.plan.features.backward_layer_tokens;
    const std::int64_t limit =
        largest_that(rows, [&](std::int64_t count) { return fits(step, collect(step, job, program, layer, count)); });
    f = collect(step, job, program, layer, limit);
  }
  if (force) {
    f = collect(step, job, program, layer, least_rows());
    if (unit_.empty()) {  // fixed windows, larger than that
      const StepFeatures& base = step.plan.features;
      f = base;
      const std::int64_t rows = backward_rows(*top, config_.max_num_batched_tokens);
      unit_.push_back({static_cast<std::size_t>(top - flights_.data()), rows});
      add_backward(f, *top->sequence, top->rows - rows, top->rows, config_.num_layers);
      ++f.backward_units;
    }
  }
  if (unit_.empty()) return Outcome::kNoFit;

  const double all_rows = static_cast<double>(f.backward_layer_tokens - step.plan.features.backward_layer_tokens);
  const double ms =
      cost_.fitted() ? cost_.predict_ms(f) - cost_.predict_ms(step.plan.features) : kBackwardProxyMs * all_rows;
  step.plan.features = f;
  step.finetune_layer_rows -= std::min(step.finetune_layer_rows, static_cast<std::int64_t>(all_rows));
  BackwardUnit& unit = step.plan.backward.emplace_back();
  unit.program = program;
  unit.layer = layer;
  for (const Rows& rows : unit_) {
    Flight& flight = flights_[rows.flight];
    const double own_ms = ms * static_cast<double>(rows.count) / all_rows;
    unit.windows.push_back({flight.sequence, flight.rows - rows.count, flight.rows, own_ms});
    charge(jobs_[flight.job], own_ms);
    flight.rows -= rows.count;
    if (flight.rows == 0 && flight.layer > flight.sequence->first_layer) {
      --flight.layer;
      flight.rows = flight.sequence->length;
    }
  }
  return Outcome::kGiven;
}

/// Puts in unit_ what is ready at (program, layer), the job's own first, up to `limit` rows; returns the step with it.
StepFeatures Scheduler::collect(const Step& step, const Job& job, std::int64_t program, std::int64_t layer,
                                std::int64_t limit) {
  unit_.clear();
  StepFeatures f = step.plan.features;
  const auto index = static_cast<std::size_t>(&job - jobs_.data());
  for (const bool own : {true, false}) {
    for (std::size_t i = 0; i < flights_.size() && limit > 0; ++i) {
      const Flight& flight = flights_[i];
      if (flight.rows == 0 || flight.layer != layer || flight.sequence->program != program) continue;
      if ((flight.job == index) != own || (!own && !may_join(step, jobs_[flight.job]))) continue;
      const std::int64_t rows = backward_rows(flight, limit);
      if (rows == 0) continue;
      unit_.push_back({i, rows});
      limit -= rows;
      add_backward(f, *flight.sequence, flight.rows - rows, flight.rows, config_.num_layers);
    }
  }
  f.backward_units += !unit_.empty();
  return f;
}

/// Whether sequences of a job may ride along in another's unit: not while its own siblings are still in their forward.
bool Scheduler::may_join(const Step& step, const Job& job) const {
  if (job.paused) return false;
  return step.drain || (job.windows == 0 && (job.forward_closed || !job.forward_work));
}

/// Rows of the next backward window of a flight, of at most `limit`; 0 when it does not fit.
std::int64_t Scheduler::backward_rows(const Flight& flight, std::int64_t limit) const {
  if (flight.sequence->backward_window_tokens > 0) {
    const std::int64_t window =
        std::min({flight.sequence->backward_window_tokens, flight.rows, config_.max_num_batched_tokens});
    return window <= limit ? window : 0;
  }
  if (flight.rows <= limit) return flight.rows;
  return limit < least_rows() ? 0 : without_sliver(limit, flight.rows);
}

std::int64_t Scheduler::least_rows() const {
  return std::min(config_.min_finetune_tokens, config_.max_num_batched_tokens);
}

/// Takes a little less than possible when only a sliver would be left of `available`.
std::int64_t Scheduler::without_sliver(std::int64_t rows, std::int64_t available) const {
  const std::int64_t least = least_rows(), left = available - rows;
  if (left <= 0 || left >= least || available < 2 * least) return rows;
  return available - least;
}

bool Scheduler::fits(const Step& step, const StepFeatures& features) const {
  return step.finetune_budget_ms > 0.0 && (!cost_.fitted() || cost_.predict_ms(features) <= step.finetune_budget_ms);
}

void Scheduler::charge(Job& job, double ms) { job.service += std::max(0.0, ms) / job.weight; }

}  // namespace flexcore
