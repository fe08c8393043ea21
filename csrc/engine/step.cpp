#include <algorithm>
#include <utility>

#include "core/check.h"
#include "engine/impl.h"

namespace flexcore {

StepReport Engine::Impl::step() {
  const double begin = now_ms();
  StepReport report;
  report.outputs = std::exchange(cancelled, {});
  report.finetune = std::exchange(job_events, {});
  StepPlan plan = scheduler.plan(begin);
  for (auto* sequence : plan.restarted) state_of(*sequence).restart();
  const bool dropped = drop_failed_training(plan);
  counters["preemptions"] += static_cast<double>(plan.preempted.size());
  counters["finetune_restarts"] += static_cast<double>(plan.restarted.size());
  if (!plan.empty()) {
    run_plan(plan, report);
    // Optimizer steps come after and are no part of the model's time; a plan that lost work says nothing about it.
    if (!dropped) cost.observe(plan.features, now_ms() - begin);
    finish_plan(report);
    counters["steps"] += 1;
  }

  report.predicted_ms = plan.predicted_ms;
  report.explain = plan.explain;
  report.elapsed_ms = now_ms() - begin;
  if (!plan.empty()) counters["busy_ms"] += report.elapsed_ms;
  return report;
}

// Memory for the stores of sequences whose first window is in the plan. A job that gets none fails alone.
bool Engine::Impl::drop_failed_training(StepPlan& plan) {
  bool dropped = false;
  for (std::size_t i = 0; i < plan.forward.size();) {
    TrainState& state = state_of(*plan.forward[i].sequence);
    TrainingJob& job = find_job(plan.forward[i].sequence->job_id);
    try {
      if (!state.allocated()) state.allocate(host_allocator(), ledger, executor->shape());
      ++i;
    } catch (const OutOfMemory& error) {
      const auto id = job.id;
      const auto of_job = [id](const TrainWindow& window) { return window.sequence->job_id == id; };
      std::erase_if(plan.forward, of_job);
      for (auto& unit : plan.backward) std::erase_if(unit.windows, of_job);
      std::erase_if(plan.backward, [](const BackwardUnit& unit) { return unit.windows.empty(); });
      end_job(job, JobStatus::kFailed, error.what());
      job_events.push_back({.job_id = id, .step = job.step, .loss = job.loss, .status = job.status});
      dropped = true;
      i = 0;
    }
  }
  return dropped;
}

void Engine::Impl::run_plan(StepPlan& plan, StepReport& report) {
  std::vector<RowGroup> groups;
  std::vector<RequestState*> sampled;
  for (const auto& work : plan.inference) {
    RequestState& request = *requests.at(work.sequence->id);
    const std::span<const std::int32_t> tokens(work.sequence->tokens);
    groups.push_back({.tokens = tokens.subspan(static_cast<std::size_t>(work.begin),
                                               static_cast<std::size_t>(work.end - work.begin)),
                      .position = work.begin,
                      .block_table = work.sequence->block_table.data(),
                      .adapter = request.adapter.get(),
                      .sampled = work.sample ? 1 : 0});
    if (work.sample) sampled.push_back(&request);
    (work.decode ? report.num_decode_tokens : report.num_prefill_tokens) += work.end - work.begin;
  }
  for (const auto& window : plan.forward) {
    TrainState& state = state_of(*window.sequence);
    const std::span<const std::int32_t> tokens(state.example->input_ids);
    groups.push_back({.tokens = tokens.subspan(static_cast<std::size_t>(window.begin),
                                               static_cast<std::size_t>(window.end - window.begin)),
                      .position = window.begin,
                      .block_table = window.sequence->block_table.data(),
                      .adapter = state.adapter.get(),
                      .train = &state});
    report.num_finetune_forward_tokens += window.end - window.begin;
  }
  const TensorView logits = executor->forward(groups);

  std::vector<std::vector<std::pair<std::int32_t, float>>> top;
  std::vector<bool> failed;
  const auto results = sample(sampled, logits, top, failed);

  std::int64_t layer_tokens = 0;
  for (const auto& unit : plan.backward) {
    std::vector<BackwardRows> rows;
    for (const auto& window : unit.windows) {
      rows.push_back({&state_of(*window.sequence), window.begin, window.end});
      layer_tokens += window.end - window.begin;
    }
    executor->backward(static_cast<int>(unit.layer), rows);
  }
  report.num_backward_units = static_cast<std::int64_t>(plan.backward.size());
  report.num_finetune_backward_tokens = layer_tokens / model.num_layers;
  counters["backward_layer_tokens"] += static_cast<double>(layer_tokens);
  counters["prompt_tokens"] += static_cast<double>(report.num_prefill_tokens);
  counters["finetune_forward_tokens"] += static_cast<double>(report.num_finetune_forward_tokens);

  scheduler.commit(plan);
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    if (failed[i]) {
      const RequestId id = sampled[i]->sequence.id;
      report.outputs.push_back({.request_id = id, .finish_reason = FinishReason::kCancelled});
      finish(id);
      counters["requests_failed"] += 1;
    } else {
      emit_token(*sampled[i], results[i], report);
    }
  }
}

void Engine::Impl::finish_plan(StepReport& report) {
  for (auto& [id, job] : jobs)
    if (job->active()) finish_sequences(*job, report);
}

// A row that cannot be sampled (NaN logits of a broken adapter) fails its own request only.
std::vector<SamplingResult> Engine::Impl::sample(const std::vector<RequestState*>& rows, const TensorView& logits,
                                                 std::vector<std::vector<std::pair<std::int32_t, float>>>& top,
                                                 std::vector<bool>& failed) {
  std::vector<SamplingRow> params;
  std::vector<SamplingResult> results(rows.size());
  failed.assign(rows.size(), false);
  top.resize(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const RequestState& request = *rows[i];
    const auto& s = request.sampling;
    const std::span<const std::int32_t> tokens(request.sequence.tokens);
    const auto prompt = static_cast<std::size_t>(request.sequence.num_prompt_tokens);
    const bool too_early = request.sequence.num_generated() < s.min_tokens;
    params.push_back(
        {.temperature = static_cast<float>(s.temperature),
         .top_p = static_cast<float>(s.top_p),
         .min_p = static_cast<float>(s.min_p),
         .top_k = static_cast<std::int32_t>(std::max<std::int64_t>(s.top_k, 0)),
         .presence_penalty = static_cast<float>(s.presence_penalty),
         .frequency_penalty = static_cast<float>(s.frequency_penalty),
         .repetition_penalty = static_cast<float>(s.repetition_penalty),
         .seed = request.seed,
         .counter = static_cast<std::uint64_t>(request.sequence.num_generated()),
         .prompt = tokens.first(prompt),
         .generated = tokens.subspan(prompt),
         .logit_bias = request.logit_bias,
         .forbidden = too_early ? std::span<const std::int32_t>(request.end_tokens) : std::span<const std::int32_t>(),
         .num_logprobs = static_cast<std::int32_t>(s.logprobs.value_or(-1))});
    top[i].resize(static_cast<std::size_t>(std::max<std::int64_t>(s.logprobs.value_or(0), 0)));
    results[i].top = top[i];
  }
  if (rows.empty()) return results;
  try {
    run(context, SampleArgs{logits, params, results});
  } catch (const Error&) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto row = static_cast<std::int64_t>(i);
      try {
        run(context, SampleArgs{logits.rows(row, row + 1), {&params[i], 1}, {&results[i], 1}});
      } catch (const Error&) {
        failed[i] = true;
      }
    }
  }
  return results;
}

void Engine::Impl::emit_token(RequestState& request, const SamplingResult& result, StepReport& report) {
  Sequence& sequence = request.sequence;
  sequence.tokens.push_back(result.token);
  if (sequence.first_token_ms < 0) sequence.first_token_ms = now_ms();
  TokenEvent event{.request_id = sequence.id, .token_id = result.token, .logprob = result.logprob};
  event.top_logprobs.assign(result.top.begin(), result.top.end());
  const bool ends =
      std::find(request.end_tokens.begin(), request.end_tokens.end(), result.token) != request.end_tokens.end();
  if (ends && sequence.num_generated() >= request.sampling.min_tokens)
    event.finish_reason = FinishReason::kStop;
  else if (static_cast<std::int64_t>(sequence.tokens.size()) >= sequence.max_total_tokens)
    event.finish_reason = FinishReason::kLength;
  counters["generation_tokens"] += 1;
  const bool done = event.finish_reason != FinishReason::kNone;
  report.outputs.push_back(std::move(event));
  if (done) {
    finish(sequence.id);
    counters["requests_finished"] += 1;
  }
}

}  // namespace flexcore
