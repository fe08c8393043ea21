#include <algorithm>
#include <utility>

#include "core/check.h"
#include "engine/impl.h"
#include "ops/rows.h"
#include "train/checkpoint.h"

namespace flexcore {

namespace {

FinetuneEvent event_of(const TrainingJob& job) {
  return {.job_id = job.id, .step = job.step, .loss = job.loss, .status = job.status};
}

}  // namespace

void Engine::Impl::fail_job(TrainingJob& job, const std::string& error) {
  end_job(job, JobStatus::kFailed, error);
  job_events.push_back(event_of(job));
}

void Engine::Impl::validate(const std::vector<Example>& examples, const AdapterLayout& layout) {
  const std::int64_t ahead = layout.num_virtual_tokens;
  require(!examples.empty(), "examples: empty, wanted at least one");
  for (std::size_t i = 0; i < examples.size(); ++i) {
    const auto& example = examples[i];
    const auto length = static_cast<std::int64_t>(example.input_ids.size());
    const std::string where = str("examples[", i, "]");
    require(example.labels.size() == example.input_ids.size(), where, ".labels: ", example.labels.size(),
            " labels, wanted as many as input_ids (", length, ")");
    require(length >= 2, where, ".input_ids: ", length, " tokens, wanted at least 2");
    require(length + ahead <= sizes.max_model_len, where, ".input_ids: ", length,
            " tokens, wanted at most max_model_len (", sizes.max_model_len, ")",
            ahead > 0 ? str(" less ", ahead, " virtual tokens") : "");
    check_tokens(example.input_ids, (where + ".input_ids").c_str());
    for (std::size_t t = 0; t < example.labels.size(); ++t)
      require(example.labels[t] == -100 || (example.labels[t] >= 0 && example.labels[t] < model.vocab_size), where,
              ".labels: ", example.labels[t], " at position ", t, ", wanted -100 or a token id below ",
              model.vocab_size);
    require(count_targets(example, layout) > 0, where,
            ".labels: no target (all are -100 after the first), nothing to learn");
    executor->reserve(fitting_program(model, config, sizes, compiled, layout.bypasses(), length + ahead, where));
  }
}

JobId Engine::Impl::start_job(const std::string& adapter, std::vector<Example> examples,
                              const FinetuneConfig& settings) {
  const auto target = adapters.get(adapter);
  check(settings);
  require(!is_training(adapter), "adapter \"", adapter, "\" is being trained by another job");
  validate(examples, target->layout);
  auto job = std::make_unique<TrainingJob>(next_job++, adapter, std::move(examples), settings);
  job->allocate(context, device->allocator(), ledger, target->layout.num_parameters);
  return begin(std::move(job));
}

JobId Engine::Impl::begin(std::unique_ptr<TrainingJob> job) {
  const JobId id = job->id;
  scheduler.add_job(id, job->config.weight);
  start_batch(*job);
  jobs.emplace(id, std::move(job));
  return id;
}

// The adapter of that name, if one is loaded, is replaced once nothing can go wrong any more.
JobId Engine::Impl::resume_finetune(const std::string& directory, std::vector<Example> examples) {
  const Checkpoint checkpoint = read_checkpoint(directory);
  const std::string& name = checkpoint.adapter;
  require(!is_training(name), "adapter \"", name, "\" is being trained by another job");
  require(static_cast<std::int64_t>(examples.size()) == checkpoint.num_examples, "examples: ", examples.size(),
          ", wanted those of the first call (", checkpoint.num_examples, ")");
  const auto adapter = adapters.read(name, directory);
  adapter->version = checkpoint.version;
  validate(examples, adapter->layout);
  auto job = std::make_unique<TrainingJob>(next_job++, name, std::move(examples), checkpoint.config);
  job->step = checkpoint.step;
  job->loss = checkpoint.loss;
  job->trained_tokens = checkpoint.trained_tokens;
  job->allocate(context, device->allocator(), ledger, adapter->layout.num_parameters);
  read_optimizer_state(directory, *job, *adapter);
  if (adapters.contains(name)) unload(name);
  adapters.publish(adapter);
  return begin(std::move(job));
}

TrainingJob& Engine::Impl::find_job(JobId id) const {
  const auto job = jobs.find(id);
  require(job != jobs.end(), "job: unknown id ", id);
  return *job->second;
}

bool Engine::Impl::is_training(const std::string& adapter) const {
  return std::any_of(jobs.begin(), jobs.end(),
                     [&](const auto& entry) { return entry.second->adapter == adapter && !entry.second->ended(); });
}

std::int64_t Engine::Impl::program_id(const TrainingProgram& program) {
  return program_ids.emplace(&program, static_cast<std::int64_t>(program_ids.size())).first->second;
}

void Engine::Impl::start_batch(TrainingJob& job) {
  const auto adapter = adapters.get(job.adapter);
  const auto batch = job.batch();
  job.batch_targets = 0;
  job.batch_loss = 0.0;
  job.sequences_done = 0;
  for (const auto index : batch)
    job.batch_targets += count_targets(job.examples[static_cast<std::size_t>(index)], adapter->layout);
  const float scale = 1.0f / static_cast<float>(job.batch_targets);
  // Of all examples of the job, in order.
  std::int64_t occurrence = job.step * std::min(job.config.batch_size, job.num_examples);
  for (const auto index : batch) {
    const Example& example = job.examples[static_cast<std::size_t>(index)];
    TrainingProgram& program =
        fitting_program(model, config, sizes, compiled, adapter->layout.bypasses(),
                        static_cast<std::int64_t>(example.input_ids.size()) + adapter->layout.num_virtual_tokens,
                        "finetune_memory_bytes");
    executor->reserve(program);
    auto state = std::make_unique<TrainState>(example, adapter, program, job.gradients(), scale);
    state->dropout = {adapter->dropout(), job.config.seed, static_cast<std::uint32_t>(occurrence++)};
    const StoreBlocks store = store_blocks(model, sizes, program, state->length());
    auto entry = std::make_unique<InFlight>();
    entry->state = state.get();
    entry->sequence = {.id = next_train_sequence++,
                       .job_id = job.id,
                       .program = program_id(program),
                       .length = state->length(),
                       .first_layer = program.first_layer,
                       .window_tokens = job.config.window_tokens.value_or(0),
                       .backward_window_tokens = job.config.backward_window_tokens.value_or(0),
                       .backward_cost = program.backward_cost,
                       .host_blocks_per_token = static_cast<double>(program.saved_bytes_per_token.host) /
                                                static_cast<double>(sizes.block_bytes),
                       .store_blocks = store.device,
                       .host_store_blocks = store.host};
    state->id = entry->sequence.id;
    state->block_table = &entry->sequence.block_table;
    scheduler.add_training(&entry->sequence);
    in_flight.emplace(state->id, std::move(entry));
    job.sequences.push_back(std::move(state));
  }
  if (job.status == JobStatus::kQueued) job.status = JobStatus::kRunning;
}

void Engine::Impl::finish_sequences(TrainingJob& job) {
  for (auto& state : job.sequences) {
    if (!state || !in_flight.at(state->id)->sequence.done) continue;
    job.batch_loss += state->loss_sum;
    const auto trained = static_cast<std::int64_t>(state->example->input_ids.size());
    job.trained_tokens += trained;
    counters["finetune_trained_tokens"] += static_cast<double>(trained);
    in_flight.erase(state->id);
    state.reset();
    ++job.sequences_done;
  }
  if (job.sequences.empty() || job.sequences_done < static_cast<std::int64_t>(job.sequences.size())) return;
  job.sequences.clear();
  try {
    const auto before = adapters.get(job.adapter);
    const double rate = job.learning_rate();
    const std::int64_t targets = job.batch_targets;
    const auto after = adapters.next_version(*before);
    const double norm = job.optimizer_step(context, *after);
    adapters.publish(after);
    blocks.forget(before->cache_key());
    job.loss = job.batch_loss / static_cast<double>(targets);
    counters["finetune_steps"] += 1;
    if (job.step < job.total_steps())
      start_batch(job);
    else
      end_job(job, JobStatus::kSucceeded, "");
    FinetuneEvent event = event_of(job);
    event.target_tokens = targets;
    event.learning_rate = rate;
    event.grad_norm = norm;
    job_events.push_back(event);
  } catch (const std::exception& error) {
    fail_job(job, error.what());
  }
}

void Engine::Impl::end_job(TrainingJob& job, JobStatus status, const std::string& error) {
  scheduler.remove_job(job.id);
  for (const auto& state : job.sequences)
    if (state) in_flight.erase(state->id);
  job.release();
  if (in_flight.empty()) device->allocator().trim();
  job.status = status;
  job.error = error;
  job.last_version = adapters.get(job.adapter)->cache_key();
}

JobInfo Engine::job(JobId id) const {
  const Impl::Entry entry(*impl_);
  const TrainingJob& job = impl_->find_job(id);
  return {job.id,      job.adapter, job.status,         job.step, job.total_steps(),
          job.epoch(), job.loss,    job.trained_tokens, job.error};
}

std::vector<JobInfo> Engine::jobs() const {
  std::vector<JobId> ids;
  {
    const Impl::Entry entry(*impl_);
    for (const auto& [id, job] : impl_->jobs) ids.push_back(id);
  }
  std::vector<JobInfo> infos;
  for (const auto id : ids) infos.push_back(job(id));
  return infos;
}

void Engine::pause_job(JobId id) {
  const Impl::Entry entry(*impl_);
  TrainingJob& job = impl_->find_job(id);
  require(job.active(), "job ", id, " is ", job_status_name(job.status), ", wanted a running one to pause");
  job.status = JobStatus::kPaused;
  impl_->scheduler.pause_job(id, true);
  impl_->job_events.push_back(event_of(job));
}

void Engine::resume_job(JobId id) {
  const Impl::Entry entry(*impl_);
  TrainingJob& job = impl_->find_job(id);
  require(job.status == JobStatus::kPaused, "job ", id, " is ", job_status_name(job.status),
          ", wanted a paused one to resume");
  job.status = JobStatus::kRunning;
  impl_->scheduler.pause_job(id, false);
  impl_->job_events.push_back(event_of(job));
  impl_->finish_sequences(job);  // its last ones may have been worked off for their pages
}

void Engine::cancel_job(JobId id) {
  const Impl::Entry entry(*impl_);
  TrainingJob& job = impl_->find_job(id);
  require(!job.ended(), "job ", id, " is ", job_status_name(job.status), ", nothing to cancel");
  impl_->end_job(job, JobStatus::kCancelled, "");
  impl_->job_events.push_back(event_of(job));
}

void Engine::set_finetune_memory(std::optional<std::int64_t> bytes) {
  const Impl::Entry entry(*impl_);
  require(bytes.value_or(1) > 0, "finetune_memory_bytes: ", bytes.value_or(1), ", wanted more than 0");
  impl_->config.finetune_memory_bytes = bytes;
  impl_->scheduler.set_finetune_tokens_in_flight(
      scheduler_config(impl_->model, impl_->config, impl_->sizes, impl_->compiled).max_finetune_tokens_in_flight);
}

JobSnapshot Engine::snapshot_job(JobId id, bool optimizer) const {
  const Impl::Entry entry(*impl_);
  const TrainingJob& job = impl_->find_job(id);
  const bool whole = optimizer && !job.ended();
  const auto adapter = impl_->adapters.get(job.adapter);
  require(!job.ended() || adapter->cache_key() == job.last_version, "job ", id, " has ended, and \"", job.adapter,
          "\" has been loaded or trained again since: its own parameters are gone");
  return JobSnapshot(std::make_shared<const JobState>(copy_state(job, *adapter, whole)));
}

// Steps may go on while files are written.
void Engine::save_checkpoint(JobId id, const std::string& directory) const {
  snapshot_job(id).save_checkpoint(directory);
}

JobSnapshot::JobSnapshot(std::shared_ptr<const JobState> state) : state_(std::move(state)) {}

std::int64_t JobSnapshot::step() const { return state_->step; }

void JobSnapshot::save_checkpoint(const std::string& directory) const { write_checkpoint(directory, *state_); }

void JobSnapshot::save_adapter(const std::string& directory) const {
  write_peft(directory, state_->adapter, state_->tensors);
}

JobId Engine::resume_finetune(const std::string& directory, std::vector<Example> examples) {
  const Impl::Entry entry(*impl_);
  return impl_->resume_finetune(directory, std::move(examples));
}

}  // namespace flexcore
