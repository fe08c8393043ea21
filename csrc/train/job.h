#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "flexcore/engine.h"
#include "memory/buffer.h"
#include "peft/adapter_store.h"
#include "train/train_state.h"

namespace flexcore {

/// Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up over warmup_ratio * total steps (rounded
/// up), then constant, linear to 0, or half a cosine to 0, as transformers' get_scheduler.
double learning_rate_at(const FinetuneConfig& config, std::int64_t step, std::int64_t total);

/// Throws InvalidArgument that names the field. Numbers that the optimizer takes as floats are judged as floats.
void check(const FinetuneConfig& config);

std::int64_t steps_per_epoch(const FinetuneConfig& config, std::int64_t num_examples);

/// One finetuning job: which examples come when, gradients, optimizer state. Position is the number of optimizer steps
/// done.
class TrainingJob {
 public:
  TrainingJob(JobId id, std::string adapter, std::vector<Example> examples, const FinetuneConfig& config);

  const JobId id;
  const std::string adapter;
  const std::int64_t num_examples;
  std::vector<Example> examples;  // until release()
  const FinetuneConfig config;
  JobStatus status = JobStatus::kQueued;
  std::int64_t step = 0;
  double loss = 0.0;
  std::int64_t trained_tokens = 0;
  std::string error;
  std::uint64_t last_version = 0;  // of the adapter, when the job ended: Adapter::cache_key()

  std::int64_t steps_per_epoch() const { return flexcore::steps_per_epoch(config, num_examples); }
  std::int64_t total_steps() const { return steps_per_epoch() * config.num_epochs; }
  std::int64_t epoch() const { return step / steps_per_epoch(); }
  bool active() const { return status == JobStatus::kQueued || status == JobStatus::kRunning; }
  bool ended() const { return status >= JobStatus::kSucceeded; }

  /// Indices of the examples of the current optimizer step.
  std::vector<std::int64_t> batch() const;

  /// Gradients and optimizer state, zeroed; allocated at the first step.
  void allocate(OpContext& context, Allocator& allocator, MemoryLedger& ledger, std::int64_t num_parameters);
  float* gradients() const { return reinterpret_cast<float*>(gradients_.data()); }
  TensorView gradient_view() const;
  /// [exp_avg, exp_avg_sq], each num_parameters; empty for SGD.
  TensorView optimizer_view() const;
  std::vector<float> download_optimizer() const;                // the same on the host
  void upload_optimizer(std::int64_t row, const void* values);  // one of the two; any alignment
  /// Gives the memory of a job that has ended back, that of its examples included.
  void release();

  /// Clips, updates the parameters, clears the gradients. Returns the gradient norm before clipping. Advances `step`.
  /// Throws Error when the gradients or the new parameters are not finite; the parameters may have changed by then.
  double optimizer_step(OpContext& context, const Adapter& adapter);
  double learning_rate() const { return learning_rate_at(config, step, total_steps()); }

  // In flight, for the current optimizer step.
  std::vector<std::unique_ptr<TrainState>> sequences;
  std::int64_t sequences_done = 0;
  std::int64_t batch_targets = 0;
  double batch_loss = 0.0;  // sum over finished sequences

 private:
  Buffer gradients_, optimizer_;
  std::int64_t num_parameters_ = 0;
};

}  // namespace flexcore
