#include <algorithm>
#include <exception>
#include <set>
#include <string>
#include <utility>

#include "core/check.h"
#include "engine/impl.h"

namespace flexcore {

// Events wait in token_events and job_events until a step ends well, so that no error loses one.
StepReport Engine::Impl::step() {
  const double begin = now_ms();
  StepReport report;
  StepPlan plan = scheduler.plan(begin);
  const double move_ms = move_blocks(plan);
  for (auto* sequence : plan.restarted) state_of(*sequence).restart();
  for (auto* sequence : plan.swapped) state_of(*sequence).swap_out();
  for (auto* sequence : plan.started)
    state_of(*sequence).place({executor->block(sequence->store), executor->block(sequence->host_store)}, ledger,
                              executor->shape());
  counters["preemptions"] += static_cast<double>(plan.preempted.size());
  counters["finetune_restarts"] += static_cast<double>(plan.restarted.size());
  counters["finetune_swaps"] += static_cast<double>(plan.swapped.size());
  if (!plan.empty()) {
    try {
      run_plan(plan, begin, report);
      // Optimizer steps come after and are no part of the model's time.
      cost.observe(plan.features, now_ms() - begin - move_ms);
    } catch (const std::exception& error) {
      executor->abandon();
      // Requests are as they were, and what was planned for them is planned again. Without training, nothing would
      // change then.
      if (!fail_training(plan, error.what())) throw;
    }
    for (auto& [id, job] : jobs)
      if (job->active()) finish_sequences(*job);
    counters["steps"] += 1;
  }

  report.outputs = std::exchange(token_events, {});
  report.finetune = std::exchange(job_events, {});
  report.predicted_ms = plan.predicted_ms;
  report.predicted_upper_ms = plan.predicted_upper_ms;
  report.explain = plan.explain;
  report.elapsed_ms = now_ms() - begin;
  if (!plan.empty()) counters["busy_ms"] += report.elapsed_ms;
  return report;
}

// How long it took.
double Engine::Impl::move_blocks(const StepPlan& plan) {
  if (plan.moves.empty()) return 0.0;
  const double begin = now_ms();
  executor->move_blocks(plan.moves);
  const double ms = now_ms() - begin;
  const std::int64_t swapped = plan.blocks_swapped(sizes.limits.num_blocks);
  const auto moved = static_cast<std::int64_t>(plan.moves.size()) - swapped;
  if (moved == 0) cost.observe_swap(swapped, ms);
  counters["kv_blocks_moved"] += static_cast<double>(moved);
  counters["kv_blocks_swapped"] += static_cast<double>(swapped);
  return ms;
}

// After an error in the middle of a plan, losses and gradients hold part of its sums: their jobs cannot go on. False:
// no job had work in it.
bool Engine::Impl::fail_training(const StepPlan& plan, const std::string& error) {
  std::set<JobId> ids;
  for (const auto& window : plan.forward) ids.insert(window.sequence->job_id);
  for (const auto& unit : plan.backward)
    for (const auto& window : unit.windows) ids.insert(window.sequence->job_id);
  for (const auto id : ids) fail_job(find_job(id), error);
  return !ids.empty();
}

void Engine::Impl::run_plan(StepPlan& plan, double begin_ms, StepReport& report) {
  std::vector<RowGroup> groups;
  std::vector<RequestState*> sampled;
  for (const auto& work : plan.inference) {
    if (work.sequence->first_step_ms < 0.0) work.sequence->first_step_ms = begin_ms;
    RequestState& request = *requests.at(work.sequence->id);
    const std::span<const std::int32_t> tokens(work.sequence->tokens);
    groups.push_back({.tokens = tokens.subspan(static_cast<std::size_t>(work.begin),
                                               static_cast<std::size_t>(work.end - work.begin)),
                      .position = work.begin,
                      .block_table = work.sequence->block_table.data(),
                      .adapter = request.adapter.get(),
                      .sampled = work.sample ? 1 : 0});
    const std::int64_t first = std::max(work.begin, request.num_virtual_tokens());
    if (const std::int64_t labels = std::min(work.end + 1, work.sequence->num_prompt_tokens) - first - 1;
        request.sampling.prompt_logprobs && work.sequence->num_generated() == 0 && labels > 0) {
      groups.back().score_from = first - work.begin;
      groups.back().score_labels =
          tokens.subspan(static_cast<std::size_t>(first + 1), static_cast<std::size_t>(labels));
      groups.back().score = request.prompt_logprobs.data() + (first - request.num_virtual_tokens());
    }
    if (work.sample) sampled.push_back(&request);
  }
  for (const auto& window : plan.forward) {
    TrainState& state = state_of(*window.sequence);
    const std::span<const std::int32_t> tokens(state.tokens);
    groups.push_back({.tokens = tokens.subspan(static_cast<std::size_t>(window.begin),
                                               static_cast<std::size_t>(window.end - window.begin)),
                      .position = window.begin,
                      .block_table = window.sequence->block_table.data(),
                      .adapter = state.adapter.get(),
                      .train = &state});
  }
  const auto run_backward = [&] {
    for (const auto& unit : plan.backward) {
      std::vector<BackwardRows> rows;
      for (const auto& window : unit.windows) rows.push_back({&state_of(*window.sequence), window.begin, window.end});
      executor->backward(static_cast<int>(unit.layer), rows);
    }
  };
  // No job has windows of both kinds in a plan, so nothing here waits for the other.
  const TensorView logits = executor->forward(groups);
  if (executor->runs_beside()) run_backward();

  std::vector<std::vector<std::pair<std::int32_t, float>>> top;
  std::vector<std::string> errors;
  const auto results = sample(sampled, logits, top, errors);
  executor->finish_forward();
  if (!executor->runs_beside()) run_backward();
  if (!plan.backward.empty()) executor->finish_backward();

  scheduler.commit(plan);
  for (const auto& unit : plan.backward)
    for (const auto& window : unit.windows)
      if (window.sequence->done) state_of(*window.sequence).release();
  count(plan, report);
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    if (errors[i].empty()) {
      emit_token(*sampled[i], results[i]);
    } else {
      end_early(sampled[i]->sequence.id, FinishReason::kError, errors[i]);
      counters["requests_failed"] += 1;
    }
  }
}

void Engine::Impl::count(const StepPlan& plan, StepReport& report) {
  for (const auto& work : plan.inference)
    (work.decode ? report.num_decode_tokens : report.num_prefill_tokens) += work.end - work.begin;
  for (const auto& window : plan.forward) report.num_finetune_forward_tokens += window.end - window.begin;
  std::int64_t layer_tokens = 0;
  for (const auto& unit : plan.backward)
    for (const auto& window : unit.windows) layer_tokens += window.end - window.begin;
  report.num_backward_units = static_cast<std::int64_t>(plan.backward.size());
  report.num_finetune_backward_tokens = layer_tokens / model.num_layers;
  counters["backward_layer_tokens"] += static_cast<double>(layer_tokens);
  counters["prompt_tokens"] += static_cast<double>(report.num_prefill_tokens);
  counters["finetune_forward_tokens"] += static_cast<double>(report.num_finetune_forward_tokens);
}

// A row that cannot be sampled (NaN logits of a broken adapter) fails its own request only; errors[i] says why.
std::vector<SamplingResult> Engine::Impl::sample(const std::vector<RequestState*>& rows, const TensorView& logits,
                                                 std::vector<std::vector<std::pair<std::int32_t, float>>>& top,
                                                 std::vector<std::string>& errors) {
  std::vector<SamplingRow> params;
  std::vector<SamplingResult> results(rows.size());
  errors.assign(rows.size(), {});
  top.resize(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const RequestState& request = *rows[i];
    const auto& s = request.sampling;
    const std::span<const std::int32_t> tokens(request.sequence.tokens);
    const auto prompt = static_cast<std::size_t>(request.sequence.num_prompt_tokens);
    const auto ahead = static_cast<std::size_t>(request.num_virtual_tokens());
    const bool too_early = request.sequence.num_generated() < s.min_tokens;
    params.push_back(
        {.temperature = static_cast<float>(s.temperature),
         .top_p = static_cast<float>(s.top_p),
         .min_p = static_cast<float>(s.min_p),
         .top_k = static_cast<std::int32_t>(std::clamp<std::int64_t>(s.top_k, 0, model.vocab_size)),
         .presence_penalty = static_cast<float>(s.presence_penalty),
         .frequency_penalty = static_cast<float>(s.frequency_penalty),
         .repetition_penalty = static_cast<float>(s.repetition_penalty),
         .seed = request.seed,
         .counter = static_cast<std::uint64_t>(request.sequence.num_generated()),
         .prompt = tokens.subspan(ahead, prompt - ahead),
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
      } catch (const Error& error) {
        errors[i] = error.what();
      }
    }
  }
  return results;
}

void Engine::Impl::emit_token(RequestState& request, const SamplingResult& result) {
  Sequence& sequence = request.sequence;
  sequence.tokens.push_back(result.token);
  const double now = now_ms();
  if (sequence.first_token_ms < 0) sequence.first_token_ms = now;
  sequence.last_token_ms = now;
  TokenEvent event{.request_id = sequence.id,
                   .token_id = result.token,
                   .logprob = result.logprob,
                   .num_cached_tokens = request.num_cached_tokens(),
                   .queue_ms = sequence.first_step_ms - sequence.arrival_ms,
                   .ttft_ms = sequence.first_token_ms - sequence.arrival_ms};
  event.top_logprobs.assign(result.top.begin(), result.top.end());
  if (sequence.num_generated() == 1) event.prompt_logprobs = std::move(request.prompt_logprobs);
  const bool ends =
      std::find(request.end_tokens.begin(), request.end_tokens.end(), result.token) != request.end_tokens.end();
  if (ends && sequence.num_generated() >= request.sampling.min_tokens)
    event.finish_reason = FinishReason::kStop;
  else if (static_cast<std::int64_t>(sequence.tokens.size()) >= sequence.max_total_tokens)
    event.finish_reason = FinishReason::kLength;
  counters["generation_tokens"] += 1;
  const bool done = event.finish_reason != FinishReason::kNone;
  token_events.push_back(std::move(event));
  if (done) {
    count_attainment(sequence);
    finish(sequence.id);
    counters["requests_finished"] += 1;
  }
}

void Engine::Impl::count_attainment(const Sequence& sequence) {
  const auto [ttft, tpot] = kept(sequence, scheduler.objectives()[static_cast<std::size_t>(sequence.slo_class)]);
  Attainment& of_class = attainment[static_cast<std::size_t>(sequence.slo_class)];
  of_class.requests += 1;
  of_class.kept_ttft += ttft;
  of_class.kept_tpot += tpot;
  of_class.kept += ttft && tpot;
}

}  // namespace flexcore
