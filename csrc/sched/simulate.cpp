#include "flexcore/simulate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>

#include "core/check.h"
#include "core/philox.h"
#include "sched/scheduler.h"

namespace flexcore {
namespace {

// Plays the engine: owns sequences and carries plans out in virtual time.
class Simulator {
 public:
  Simulator(const std::vector<SimulatedRequest>& requests, const std::vector<SimulatedJob>& jobs,
            const SimulationConfig& config)
      : config_(config),
        requests_(requests),
        coefficients_(step_time(config.step_time_ms)),
        blocks_(config.num_blocks, config.engine.block_size, false),
        scheduler_(scheduler_config(), blocks_, cost_) {
    cost_.restore(coefficients_.coefficients());
    constexpr std::int64_t kMostBlockSize = std::int64_t{1} << 20;
    require(config.engine.block_size <= kMostBlockSize, "block_size: ", config.engine.block_size, ", wanted at most ",
            kMostBlockSize);
    const std::int64_t room = config.num_blocks * config.engine.block_size + 1;  // the last token is not kept
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const auto& request = requests[i];
      const auto refuse = [&](const char* field, auto value, const char* wanted) {
        throw InvalidArgument(str("requests[", i, "].", field, ": ", value, ", wanted ", wanted));
      };
      const double before = i == 0 ? 0.0 : requests[i - 1].arrival_ms;
      if (!(request.arrival_ms >= before && std::isfinite(request.arrival_ms)))
        refuse("arrival_ms", request.arrival_ms, "at or after the one before");
      if (request.prompt_tokens < 1) refuse("prompt_tokens", request.prompt_tokens, ">= 1");
      if (request.output_tokens < 1) refuse("output_tokens", request.output_tokens, ">= 1");
      if (request.prompt_tokens > room - std::min(request.output_tokens, room))
        refuse("prompt_tokens", request.prompt_tokens, "with output_tokens no more than num_blocks hold");
      if (!classes_.contains(request.slo_class)) refuse("slo_class", request.slo_class, "one of slo_classes");
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      require(!jobs[i].lengths.empty(), "jobs[", i, "].lengths: empty, wanted at least one");
      require(jobs[i].batch_size >= 1 && jobs[i].batch_size <= kMostSequences, "jobs[", i,
              "].batch_size: ", jobs[i].batch_size, ", wanted 1 to ", kMostSequences);
      scheduler_.add_job(static_cast<std::int64_t>(i), jobs[i].weight);
      jobs_.push_back({.spec = &jobs[i]});
      start_batch(i);
    }
    result_.answers.resize(requests.size());
  }

  Simulation run() {
    while (true) {
      for (; next_ < requests_.size() && requests_[next_].arrival_ms <= now_ms_; ++next_) arrive(next_);
      if (now_ms_ >= config_.duration_ms && training_) stop_training();
      if (!scheduler_.has_inference() && !scheduler_.has_training()) {
        if (next_ == requests_.size()) break;
        now_ms_ = requests_[next_].arrival_ms;
        continue;
      }
      step();
    }
    if (training_) stop_training();
    result_.end_ms = now_ms_;
    result_.blocks_free = blocks_.num_free();
    return std::move(result_);
  }

 private:
  static constexpr std::int64_t kMostStepsAtOnce = 100'000, kMostSequences = 1 << 20, kMostLayers = 1 << 16;
  struct Job {
    const SimulatedJob* spec;
    std::vector<std::unique_ptr<TrainSequence>> batch;
    std::size_t next_example = 0;
  };

  static CostModel step_time(const std::map<std::string, double>& by_name) {
    const auto names = CostModel::term_names();
    std::array<double, CostModel::kTerms> values{};
    for (const auto& [name, value] : by_name) {
      const auto found = std::find(names.begin(), names.end(), name);
      require(found != names.end(), "step_time_ms: unknown term \"", name, "\"");
      require(std::isfinite(value) && value >= 0.0, "step_time_ms[\"", name, "\"]: ", value, ", wanted >= 0");
      values[static_cast<std::size_t>(found - names.begin())] = value;
    }
    require(std::any_of(values.begin(), values.end(), [](double v) { return v > 0.0; }),
            "step_time_ms: nothing takes time, wanted at least one term above 0");
    CostModel model;
    model.restore(values);
    return model;
  }

  SchedulerConfig scheduler_config() {
    const EngineConfig& engine = config_.engine;
    const auto fraction = [](double value, const char* name) {
      require(std::isfinite(value) && value >= 0.0, name, ": ", value, ", wanted >= 0");
    };
    fraction(config_.noise, "noise");
    fraction(config_.stall_share, "stall_share");
    fraction(config_.stall_ms, "stall_ms");
    fraction(config_.between_steps_ms, "between_steps_ms");
    fraction(config_.optimizer_ms, "optimizer_ms");
    fraction(config_.duration_ms, "duration_ms");
    require(config_.num_layers >= 1 && config_.num_layers <= kMostLayers, "num_layers: ", config_.num_layers,
            ", wanted 1 to ", kMostLayers);
    require(config_.max_finetune_tokens_in_flight >= 1,
            "max_finetune_tokens_in_flight: ", config_.max_finetune_tokens_in_flight, ", wanted >= 1");
    SchedulerConfig scheduler{.max_num_seqs = std::min(engine.max_num_seqs, engine.max_num_batched_tokens),
                              .max_num_batched_tokens = engine.max_num_batched_tokens,
                              .num_layers = config_.num_layers,
                              .objectives = {engine.slo},
                              .policy = engine.policy,
                              .max_finetune_tokens_in_flight = config_.max_finetune_tokens_in_flight,
                              .min_finetune_share = engine.min_finetune_share};
    classes_.emplace("", 0);
    for (const auto& [name, slo] : engine.slo_classes) {
      classes_.emplace(name, static_cast<std::int64_t>(scheduler.objectives.size()));
      scheduler.objectives.push_back(slo);
    }
    return scheduler;
  }

  void arrive(std::size_t index) {
    const SimulatedRequest& request = requests_[index];
    auto sequence = std::make_unique<Sequence>();
    sequence->id = static_cast<std::int64_t>(index);
    sequence->tokens.assign(static_cast<std::size_t>(request.prompt_tokens), 0);
    sequence->num_prompt_tokens = request.prompt_tokens;
    sequence->max_total_tokens = request.prompt_tokens + request.output_tokens;
    sequence->use_prefix_cache = false;
    sequence->slo_class = classes_.at(request.slo_class);
    sequence->arrival_ms = request.arrival_ms;
    scheduler_.add(sequence.get());
    running_.emplace(index, std::move(sequence));
  }

  void start_batch(std::size_t index) {
    Job& job = jobs_[index];
    job.batch.clear();
    for (std::int64_t i = 0; i < job.spec->batch_size; ++i) {
      auto& sequence = job.batch.emplace_back(std::make_unique<TrainSequence>());
      sequence->id = next_train_sequence_++;
      sequence->job_id = static_cast<std::int64_t>(index);
      sequence->length = job.spec->lengths[job.next_example++ % job.spec->lengths.size()];
      scheduler_.add_training(sequence.get());
    }
  }

  void stop_training() {
    for (std::size_t i = 0; i < jobs_.size(); ++i) scheduler_.remove_job(static_cast<std::int64_t>(i));
    jobs_.clear();
    training_ = false;
  }

  double time_of(const StepFeatures& features) {
    // Normal by Box and Muller, from two draws of this step.
    const double u = std::max(uniform(config_.engine.seed, 3 * draws_), 1e-12);
    const double v = uniform(config_.engine.seed, 3 * draws_ + 1);
    const bool stall = uniform(config_.engine.seed, 3 * draws_ + 2) < config_.stall_share;
    ++draws_;
    const double normal = std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
    return coefficients_.predict_ms(features) * std::exp(config_.noise * normal) + (stall ? config_.stall_ms : 0.0);
  }

  void step() {
    const StepPlan plan = scheduler_.plan(now_ms_);
    require<Error>(!plan.empty() || !plan.preempted.empty(), "simulate: nothing planned at ", now_ms_,
                   " ms: ", plan.explain);
    const double elapsed = plan.empty() ? 0.0 : time_of(plan.features);
    result_.steps.push_back({.begin_ms = now_ms_,
                             .elapsed_ms = elapsed,
                             .predicted_ms = plan.predicted_ms,
                             .predicted_upper_ms = plan.predicted_upper_ms,
                             .budget_ms = plan.budget_ms,
                             .decode_rows = plan.features.decode_rows,
                             .prefill_tokens = plan.features.prefill_tokens,
                             .finetune_tokens = plan.features.finetune_tokens,
                             .backward_layer_tokens = plan.features.backward_layer_tokens,
                             .running = scheduler_.num_running(),
                             .waiting = scheduler_.num_waiting(),
                             .floor = plan.floor});
    now_ms_ += elapsed + config_.between_steps_ms;
    ++steps_at_once_;
    if (now_ms_ > moment_ms_ + 1e-6) moment_ms_ = now_ms_, steps_at_once_ = 0;
    require(steps_at_once_ < kMostStepsAtOnce, "step_time_ms: ", kMostStepsAtOnce, " steps took no time at ", now_ms_,
            " ms, wanted terms above 0 for what they do");
    scheduler_.commit(plan);
    cost_.observe(plan.features, elapsed);
    result_.finetune_tokens += static_cast<double>(plan.features.finetune_tokens);
    result_.backward_layer_tokens += static_cast<double>(plan.features.backward_layer_tokens);
    for (const SequenceWork& work : plan.inference)
      if (work.sample) emit(*work.sequence);
    finish_batches();
  }

  void emit(Sequence& sequence) {
    sequence.tokens.push_back(0);
    SimulatedAnswer& answer = result_.answers[static_cast<std::size_t>(sequence.id)];
    if (sequence.num_generated() == 1) sequence.first_token_ms = now_ms_;
    sequence.last_token_ms = now_ms_;
    answer.token_ms.push_back(now_ms_);
    if (static_cast<std::int64_t>(sequence.tokens.size()) < sequence.max_total_tokens) return;
    const auto [ttft, tpot] = kept(sequence, scheduler_.objectives()[static_cast<std::size_t>(sequence.slo_class)]);
    answer.kept = ttft && tpot;
    scheduler_.finish(&sequence);
    running_.erase(static_cast<std::size_t>(sequence.id));
  }

  void finish_batches() {
    for (std::size_t i = 0; i < jobs_.size(); ++i) {
      auto& batch = jobs_[i].batch;
      for (auto& sequence : batch) {
        if (sequence == nullptr || !sequence->done) continue;
        result_.trained_tokens += static_cast<double>(sequence->length);
        sequence.reset();
      }
      if (std::any_of(batch.begin(), batch.end(), [](const auto& sequence) { return sequence != nullptr; })) continue;
      now_ms_ += config_.optimizer_ms;
      ++result_.optimizer_steps;
      start_batch(i);
    }
  }

  const SimulationConfig& config_;
  const std::vector<SimulatedRequest>& requests_;
  std::map<std::string, std::int64_t> classes_;  // filled while the scheduler is made
  CostModel coefficients_;                       // the truth
  CostModel cost_;                               // what the scheduler knows
  BlockManager blocks_;
  Scheduler scheduler_;
  std::map<std::size_t, std::unique_ptr<Sequence>> running_;
  std::vector<Job> jobs_;
  Simulation result_;
  std::size_t next_ = 0;  // request to arrive
  std::int64_t next_train_sequence_ = 0;
  std::uint64_t draws_ = 0;
  double now_ms_ = 0.0, moment_ms_ = 0.0;
  std::int64_t steps_at_once_ = 0;
  bool training_ = true;
};

}  // namespace

Simulation simulate(const std::vector<SimulatedRequest>& requests, const std::vector<SimulatedJob>& jobs,
                    const SimulationConfig& config) {
  return Simulator(requests, jobs, config).run();
}

}  // namespace flexcore
