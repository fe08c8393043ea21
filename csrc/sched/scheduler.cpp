#include "sched/scheduler.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "core/check.h"
#include "sched/search.h"
#include "sched/slack.h"

namespace flexcore {
namespace {

std::int64_t num_tokens(const Sequence& sequence) { return static_cast<std::int64_t>(sequence.tokens.size()); }

bool is_decode(const Sequence& sequence) {
  return sequence.num_generated() > 0 && num_tokens(sequence) - sequence.num_computed_tokens == 1;
}

std::int64_t num_blocks(const TrainSequence& sequence) {
  return static_cast<std::int64_t>(sequence.block_table.size()) + sequence.store.count;
}

std::string explain(const StepPlan& plan) {
  const StepFeatures& f = plan.features;
  char text[192];
  int length = std::snprintf(text, sizeof text, "decode %lld, prefill %lld, s=%lld, units %lld",
                             static_cast<long long>(f.decode_rows), static_cast<long long>(f.prefill_tokens),
                             static_cast<long long>(f.finetune_tokens), static_cast<long long>(f.backward_units));
  const auto rest = [&] { return sizeof text - static_cast<std::size_t>(length); };
  if (!plan.preempted.empty()) length += std::snprintf(text + length, rest(), ", preempted %zu", plan.preempted.size());
  if (!plan.restarted.empty()) length += std::snprintf(text + length, rest(), ", restarted %zu", plan.restarted.size());
  if (!plan.swapped.empty()) length += std::snprintf(text + length, rest(), ", swapped out %zu", plan.swapped.size());
  length += std::snprintf(text + length, rest(), ": predicted %.1f of %.1f ms", plan.predicted_ms, plan.budget_ms);
  std::snprintf(text + length, rest(), "%s%s", plan.reason.empty() ? "" : ", ", plan.reason.c_str());
  return text;
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config, BlockManager& blocks, CostModel& cost)
    : config_(config), policy_(make_policy(config.policy)), blocks_(blocks), cost_(cost) {
  const auto at_least_one = [](const char* name, std::int64_t value) {
    require(value >= 1, "Scheduler: ", name, " is ", value, ", wanted at least 1");
  };
  at_least_one("max_num_seqs", config.max_num_seqs);
  at_least_one("max_num_batched_tokens", config.max_num_batched_tokens);
  at_least_one("num_layers", config.num_layers);
  at_least_one("min_prefill_tokens", config.min_prefill_tokens);
  at_least_one("min_finetune_tokens", config.min_finetune_tokens);
  require(config.min_finetune_share >= 0.0 && config.min_finetune_share <= 1.0, "Scheduler: min_finetune_share is ",
          config.min_finetune_share, ", wanted 0 to 1");
  config_.objectives.clear();
  for (const SLO& slo : config.objectives) set_objective(static_cast<std::int64_t>(config_.objectives.size()), slo);
  require(!config_.objectives.empty(), "Scheduler: no objectives");
}

void Scheduler::set_objective(std::int64_t slo_class, const SLO& slo) {
  auto& objectives = config_.objectives;
  const auto index = static_cast<std::size_t>(slo_class);
  require(slo_class >= 0 && index <= objectives.size(), "Scheduler.set_objective: class ", slo_class, ", wanted 0 to ",
          objectives.size());
  require(slo.tpot_ms > 0.0, "Scheduler.set_objective: tpot_ms is ", slo.tpot_ms, ", wanted above 0");
  require(slo.ttft_ms > 0.0, "Scheduler.set_objective: ttft_ms is ", slo.ttft_ms, ", wanted above 0");
  require(slo.attainment > 0.0 && slo.attainment < 1.0, "Scheduler.set_objective: attainment is ", slo.attainment,
          ", wanted between 0 and 1");
  if (index == objectives.size()) objectives.emplace_back();
  objectives[index] = slo;
  double attainment = 0.0;
  for (const SLO& each : objectives) attainment = std::max(attainment, each.attainment);
  cost_.set_margin_quantile(attainment);
}

void Scheduler::add(Sequence* sequence) {
  require(!sequence->tokens.empty(), "Scheduler.add: sequence ", sequence->id, " has no tokens");
  // The last token that is generated never needs a key and value.
  const std::int64_t needed = blocks_.blocks_for(std::max(num_tokens(*sequence), sequence->max_total_tokens - 1));
  require<OutOfMemory>(needed <= blocks_.num_blocks(), "Scheduler.add: sequence ", sequence->id, " needs ", needed,
                       " pages of ", blocks_.block_size(), " tokens, the pool has ", blocks_.num_blocks());
  require(sequence->slo_class >= 0 && static_cast<std::size_t>(sequence->slo_class) < config_.objectives.size(),
          "Scheduler.add: sequence ", sequence->id, " has slo_class ", sequence->slo_class, ", wanted 0 to ",
          config_.objectives.size() - 1);
  sequence->state = Sequence::State::kWaiting;
  waiting_.push_back(sequence);
  policy_->arrived(sequence->arrival_ms);
}

void Scheduler::finish(Sequence* sequence) {
  if (sequence->state == Sequence::State::kFinished) return;
  if (sequence->state == Sequence::State::kRunning)
    std::erase(running_, sequence);
  else
    std::erase(waiting_, sequence);
  blocks_.release(sequence->block_table);
  sequence->state = Sequence::State::kFinished;
}

void Scheduler::add_job(std::int64_t job_id, double weight) {
  require(std::isfinite(weight) && weight > 0.0, "Scheduler.add_job: weight is ", weight, ", wanted above 0");
  for (const Job& other : jobs_) require(other.id != job_id, "Scheduler.add_job: job ", job_id, " exists");
  Job added;
  added.id = job_id;
  added.weight = weight;
  jobs_.push_back(std::move(added));
}

void Scheduler::pause_job(std::int64_t job_id, bool paused) { job(job_id, "pause_job").paused = paused; }

void Scheduler::remove_job(std::int64_t job_id) {
  for (TrainSequence* sequence : job(job_id, "remove_job").sequences) {
    release(*sequence);
    std::erase(started_, sequence);
  }
  std::erase_if(jobs_, [&](const Job& j) { return j.id == job_id; });
}

void Scheduler::add_training(TrainSequence* sequence) {
  Job& owner = job(sequence->job_id, "add_training");
  require(sequence->length >= 1, "Scheduler.add_training: sequence ", sequence->id, " has length ", sequence->length,
          ", wanted at least 1");
  require(sequence->first_layer >= 0 && sequence->first_layer < config_.num_layers,
          "Scheduler.add_training: first_layer is ", sequence->first_layer, ", wanted 0 to ", config_.num_layers - 1);
  const std::int64_t needed = blocks_.blocks_for(sequence->length) + sequence->store_blocks;
  require<OutOfMemory>(needed <= blocks_.num_blocks(), "Scheduler.add_training: sequence ", sequence->id, " needs ",
                       needed, " pages of ", blocks_.block_size(), " tokens, the pool has ", blocks_.num_blocks());
  require<OutOfMemory>(sequence->host_store_blocks <= blocks_.num_host_blocks(), "Scheduler.add_training: sequence ",
                       sequence->id, " needs ", sequence->host_store_blocks, " pages of host memory, there are ",
                       blocks_.num_host_blocks());
  sequence->started = sequence->done = false;
  sequence->forward_done = 0;
  owner.sequences.push_back(sequence);
}

bool Scheduler::has_training() const {
  return policy_->trains() &&
         std::any_of(jobs_.begin(), jobs_.end(), [](const Job& j) { return !j.paused && !j.sequences.empty(); });
}

Scheduler::Job& Scheduler::job(std::int64_t job_id, const char* op) {
  const auto found = std::find_if(jobs_.begin(), jobs_.end(), [&](const Job& j) { return j.id == job_id; });
  require(found != jobs_.end(), "Scheduler.", op, ": there is no job ", job_id);
  return *found;
}

StepPlan Scheduler::plan(double now_ms) {
  StepPlan plan;
  Step step{.plan = plan, .rows_left = config_.max_num_batched_tokens, .rows_for_finetune = 0};
  begin_jobs(step);
  StepFeatures decode;
  for (const Sequence* sequence : running_) {
    if (!is_decode(*sequence)) continue;
    ++decode.decode_rows;
    ++decode.sampled_rows;
    decode.decode_context += num_tokens(*sequence);
  }
  const StepLimits limits = step_limits(running_, config_.objectives, now_ms, cost_.predict_ms(decode), cost_.margin());
  step.prefill_budget_ms = limits.prefill_ms;
  step.first_token_due = first_token_is_due(now_ms);

  Load load{.now_ms = now_ms,
            .inference = has_inference(),
            .training = has_training(),
            .num_waiting = num_waiting(),
            .idle_ms = idle_ms()};
  step.serves = policy_->serves(load);
  if (step.serves) plan_inference(step);
  const StepFeatures inference = plan.features;
  plan_finetune(step, load, limits);
  if (plan.empty() && (!step.serves || step.holds_admission)) {  // nothing could be trained
    step.serves = true;
    step.holds_admission = false;
    plan_inference(step);
  }
  const double work_ms = cost_.predict_ms(plan.features);
  plan.finetune_ms += work_ms - cost_.predict_ms(inference);
  plan.predicted_ms = work_ms + cost_.swap_ms(plan.blocks_swapped(blocks_.num_blocks()));
  plan.predicted_upper_ms = plan.predicted_ms * (1.0 + cost_.margin());
  plan.explain = explain(plan);
  return plan;
}

void Scheduler::plan_inference(Step& step) {
  plan_decode(step);
  plan_prefill(step);
}

/// The longest step while nobody is there: only the request that may come next waits for it.
double Scheduler::idle_ms() const {
  double longest = std::numeric_limits<double>::infinity();
  for (const SLO& slo : config_.objectives)
    longest = std::min(longest, std::max(slo.tpot_ms, std::min(slo.ttft_ms / 4.0, config_.max_idle_step_ms)));
  return longest;
}

/// Somebody without a token has used up half of its time, or needs half of what is left: no step is made longer.
bool Scheduler::first_token_is_due(double now_ms) const {
  constexpr std::size_t kMostLookedAt = 64;  // of those who wait, so that a long queue costs nothing
  double work_ms = 0.0;
  const auto due = [&](const Sequence& sequence) {
    if (sequence.num_generated() > 0) return false;
    const double ttft = config_.objectives[static_cast<std::size_t>(sequence.slo_class)].ttft_ms;
    const double left = ttft - (now_ms - sequence.arrival_ms);
    const std::int64_t begin = sequence.num_computed_tokens, end = num_tokens(sequence);
    work_ms += cost_.predict_ms({.prefill_tokens = end - begin, .prefill_context = context_sum(begin, end)});
    return left < std::max(ttft / 2.0, 2.0 * work_ms);
  };
  for (const Sequence* sequence : running_)
    if (due(*sequence)) return true;
  for (std::size_t i = 0; i < std::min(waiting_.size(), kMostLookedAt); ++i)
    if (due(*waiting_[i])) return true;
  return false;
}

/// Whatever it has, wherever.
void Scheduler::release(TrainSequence& sequence) {
  for (auto* table : {&sequence.block_table, &sequence.host_table}) blocks_.release(*table);
  for (auto* run : {&sequence.store, &sequence.host_store}) blocks_.release_run(*run);
  sequence.started = false;
}

BlockRun Scheduler::reserve_run(std::int64_t count, std::vector<BlockMove>& moves, Tier tier) {
  const std::size_t before = moves.size();
  const BlockRun run = blocks_.reserve_run(count, moves, tier);
  const auto renumber = [&](std::vector<std::int32_t>& table) {
    for (auto& page : table)
      for (std::size_t i = before; i < moves.size(); ++i)
        if (moves[i].from == page) {
          page = moves[i].to;
          break;
        }
  };
  if (moves.size() == before) return run;
  for (Sequence* sequence : running_) renumber(sequence->block_table);
  for (Job& j : jobs_)
    for (TrainSequence* sequence : j.sequences)
      for (auto* table : {&sequence->block_table, &sequence->host_table}) renumber(*table);
  return run;
}

Scheduler::BlocksHeld Scheduler::blocks_held() {
  BlocksHeld held;
  std::int64_t free_host = blocks_.num_free_host();
  for (const TrainSequence* sequence : started_) {
    const std::int64_t blocks = num_blocks(*sequence);
    const bool to_host = sequence->in_backward() && backward_yields(*sequence, free_host);
    (to_host || !sequence->in_backward() ? held.yielding : held.staying) += blocks;
    if (to_host) free_host -= blocks;
  }
  return held;
}

/// To host pages and back.
double Scheduler::swap_ms(const TrainSequence& sequence) const {
  return 2.0 * cost_.swap_ms(blocks_.blocks_for(sequence.length) + sequence.store_blocks);
}

/// Whether a backward phase goes to host pages for requests: nobody else would end it, or its end is further away.
bool Scheduler::backward_yields(const TrainSequence& sequence, std::int64_t free_host_blocks) {
  if (num_blocks(sequence) > free_host_blocks) return false;
  if (job(sequence.job_id, "plan").paused) return true;
  if (sequence.stay_ms > 0.0) return false;
  if (!cost_.fitted()) return true;
  const std::int64_t whole_layers = sequence.layer - sequence.first_layer, rows = sequence.rows_left;
  StepFeatures left;
  for (std::int64_t layer = 0; layer < whole_layers; ++layer)
    add_backward(left, sequence, 0, sequence.length, config_.num_layers);
  add_backward(left, sequence, 0, rows, config_.num_layers);
  left.backward_units = whole_layers + 1;
  return cost_.predict_ms(left) > swap_ms(sequence);
}

/// One training sequence gives its pages back.
bool Scheduler::yield_one(StepPlan& plan, Yielding who) {
  // Sequences of paused jobs go first, then forward phases; the last one started has done least.
  TrainSequence* victim = nullptr;
  int victim_rank = 0;
  for (auto it = started_.rbegin(); it != started_.rend(); ++it) {
    const TrainSequence& candidate = **it;
    const bool paused = job(candidate.job_id, "plan").paused, backward = candidate.in_backward();
    if ((who != Yielding::kAny && !paused) || (who == Yielding::kPausedForwards && backward)) continue;
    if (backward && !backward_yields(candidate, blocks_.num_free_host())) continue;
    const int rank = 1 + 2 * paused + !backward;
    if (rank <= victim_rank) continue;
    victim = *it;
    victim_rank = rank;
  }
  if (victim == nullptr) return false;
  std::erase(started_, victim);
  StepFeatures again;
  add_forward(again, *victim, 0, victim->forward_done);
  const double again_ms = cost_.predict_ms(again);
  if ((victim->in_backward() || again_ms > swap_ms(*victim)) &&
      blocks_.swap_out(victim->block_table, victim->store, victim->host_table, plan.moves)) {
    victim->started = false;
    plan.swapped.push_back(victim);
    return true;
  }
  restart(plan, *victim);
  return true;
}

void Scheduler::restart(StepPlan& plan, TrainSequence& sequence) {
  release(sequence);
  sequence.forward_done = 0;
  sequence.stay_ms = sequence.waited_ms = 0.0;
  std::erase(plan.swapped, &sequence);
  plan.restarted.push_back(&sequence);
}

void Scheduler::preempt(StepPlan& plan, Sequence* sequence) {
  blocks_.release(sequence->block_table);
  sequence->num_computed_tokens = 0;
  sequence->state = Sequence::State::kWaiting;
  std::erase(running_, sequence);
  waiting_.push_front(sequence);
  plan.preempted.push_back(sequence);
}

bool Scheduler::reserve_decode(Step& step, Sequence& sequence) {
  while (!blocks_.reserve(sequence.block_table, sequence.num_computed_tokens + 1)) {
    step.short_of_pages = true;
    if (yield_one(step.plan, Yielding::kAny)) continue;
    if (running_.back() != &sequence) {
      preempt(step.plan, running_.back());
      continue;
    }
    // The youngest itself. Pages in backward come back for certain, so that it waits with its work kept.
    if (blocks_held().staying > 0) {
      step.drain = true;
      return false;
    }
    require<Error>(running_.size() > 1, "Scheduler.plan: sequence ", sequence.id, " has ", num_tokens(sequence),
                   " tokens, more than its max_total_tokens ", sequence.max_total_tokens, " and than the pool holds");
    preempt(step.plan, &sequence);
    return false;
  }
  return true;
}

void Scheduler::add_work(Step& step, Sequence& sequence, std::int64_t count, bool decode) {
  const std::int64_t begin = sequence.num_computed_tokens, end = begin + count;
  const bool sample = end == num_tokens(sequence);
  StepFeatures& f = step.plan.features;
  (decode ? f.decode_rows : f.prefill_tokens) += count;
  (decode ? f.decode_context : f.prefill_context) += context_sum(begin, end);
  f.sampled_rows += sample;
  step.rows_left -= count;
  step.plan.inference.push_back({&sequence, begin, end, sample, decode});
}

void Scheduler::plan_decode(Step& step) {
  for (std::size_t i = 0; i < running_.size() && step.rows_left > 0; ++i) {  // running_ may lose its end meanwhile
    Sequence& sequence = *running_[i];
    if (is_decode(sequence) && reserve_decode(step, sequence)) add_work(step, sequence, 1, true);
  }
}

/// How many tokens of [begin, end) to compute now; 0 when there are no rows or no time.
std::int64_t Scheduler::prefill_chunk(const Step& step, std::int64_t begin, std::int64_t end) const {
  const StepFeatures& base = step.plan.features;
  const std::int64_t rows = std::min(end - begin, step.rows_left - step.rows_for_finetune);
  if (rows <= 0 || base.decode_rows == 0 || !cost_.fitted()) return std::max<std::int64_t>(rows, 0);
  const double budget_ms = step.prefill_budget_ms - cost_.swap_ms(step.plan.blocks_swapped(blocks_.num_blocks()));
  const std::int64_t in_time = largest_that(rows, [&](std::int64_t count) {
    StepFeatures f = base;
    f.prefill_tokens += count;
    f.prefill_context += context_sum(begin, begin + count);
    f.sampled_rows += begin + count == end;
    return cost_.predict_ms(f) <= budget_ms;
  });
  if (!step.first_token_due) return in_time;
  return std::max(in_time, std::min(rows, config_.min_prefill_tokens - base.prefill_tokens));
}

/// Gets `missing_blocks` pages and a slot free for the first request in line, at the cost of training if need be.
bool Scheduler::make_room(Step& step, std::int64_t missing_blocks) {
  const auto slot = [&] { return static_cast<std::int64_t>(running_.size() + started_.size()) < config_.max_num_seqs; };
  const auto room = [&] { return missing_blocks <= blocks_.num_free() && slot(); };
  if (room()) return true;
  BlocksHeld held = blocks_held();
  if ((slot() || held.yielding > 0) && missing_blocks <= blocks_.num_free() + held.yielding)
    while (yield_one(step.plan, Yielding::kAny))
      if (room()) return true;
  held = blocks_held();  // host pages may have been too few for all of them
  const bool slot_possible = num_running() < config_.max_num_seqs;
  step.blocked = true;
  step.drain = step.drain || (held.staying > 0 && slot_possible &&
                              missing_blocks <= blocks_.num_free() + held.yielding + held.staying);
  return false;
}

void Scheduler::plan_prefill(Step& step) {
  for (Sequence* sequence : running_) {
    if (is_decode(*sequence)) continue;
    const std::int64_t count = prefill_chunk(step, sequence->num_computed_tokens, num_tokens(*sequence));
    if (count > 0 && blocks_.reserve(sequence->block_table, sequence->num_computed_tokens + count))
      add_work(step, *sequence, count, false);
  }
  while (!waiting_.empty() && !step.short_of_pages && !step.holds_admission) {
    Sequence& sequence = *waiting_.front();
    BlockManager::Prefix prefix;
    if (sequence.use_prefix_cache) prefix = blocks_.find_prefix(sequence.cache_key, sequence.tokens);
    if (prefill_chunk(step, prefix.num_tokens, num_tokens(sequence)) == 0) return;
    if (!make_room(step, blocks_.blocks_for(num_tokens(sequence)) - prefix.blocks_in_use)) return;
    const std::int64_t count = prefill_chunk(step, prefix.num_tokens, num_tokens(sequence));
    if (count == 0) return;  // making room took its time
    if (sequence.use_prefix_cache) blocks_.match_prefix(sequence.cache_key, sequence.tokens, sequence.block_table);
    sequence.num_computed_tokens = prefix.num_tokens;
    if (sequence.num_generated() == 0) sequence.num_cached_tokens = prefix.num_tokens;
    require<Error>(blocks_.reserve(sequence.block_table, num_tokens(sequence)),
                   "Scheduler.plan: counted pages wrongly");
    sequence.state = Sequence::State::kRunning;
    waiting_.pop_front();
    running_.push_back(&sequence);
    add_work(step, sequence, count, is_decode(sequence));  // recomputed from the cache up to its last token
  }
}

void Scheduler::commit(const StepPlan& plan) {
  for (const SequenceWork& work : plan.inference) {
    Sequence& sequence = *work.sequence;
    if (sequence.state != Sequence::State::kRunning) continue;
    sequence.num_computed_tokens = work.end;
    const bool block_filled = work.end / blocks_.block_size() > work.begin / blocks_.block_size();
    if (sequence.use_prefix_cache && block_filled)
      blocks_.register_blocks(sequence.cache_key, sequence.tokens, work.end, sequence.block_table);
  }
  for (const TrainWindow& window : plan.forward) {
    TrainSequence& sequence = *window.sequence;
    if (!sequence.started) continue;
    sequence.stay_ms -= window.predicted_ms;
    sequence.forward_done = window.end;
    if (window.end == sequence.length) {
      sequence.layer = config_.num_layers - 1;
      sequence.rows_left = sequence.length;
    }
  }
  std::int64_t sequences_done = 0;
  for (const BackwardUnit& unit : plan.backward) sequences_done += commit_backward(unit);
  // A forced piece may be more than was owed, and is then paid off; what was given freely is no credit.
  owed_ms_ += config_.min_finetune_share * plan.predicted_ms - plan.finetune_ms;
  if (!plan.counts_for_floor || (plan.features.any_finetune() && !plan.floor)) owed_ms_ = 0.0;
  policy_->stepped(plan, sequences_done);
}

/// How many sequences are done with it.
std::int64_t Scheduler::commit_backward(const BackwardUnit& unit) {
  std::int64_t done = 0;
  for (const TrainWindow& window : unit.windows) {
    TrainSequence& sequence = *window.sequence;
    if (!sequence.started) continue;
    sequence.stay_ms -= window.predicted_ms;
    sequence.rows_left = window.begin;
    if (window.begin > 0) continue;
    if (unit.layer > sequence.first_layer) {
      sequence.layer = unit.layer - 1;
      sequence.rows_left = sequence.length;
      continue;
    }
    release(sequence);
    sequence.done = true;
    ++done;
    std::erase(started_, &sequence);
    std::erase(job(sequence.job_id, "commit").sequences, &sequence);
  }
  return done;
}

}  // namespace flexcore
