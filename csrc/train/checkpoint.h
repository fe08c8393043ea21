#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flexcore/config.h"
#include "train/job.h"

namespace flexcore {

/// What a checkpoint says beside the adapter (PEFT files) and the optimizer state (optimizer.safetensors).
struct Checkpoint {
  std::string adapter;
  FinetuneConfig config;
  std::int64_t step = 0;
  double loss = 0.0;
  std::int64_t trained_tokens = 0;
  std::int64_t num_examples = 0;
  std::int64_t version = 0;  // of the adapter
};

/// A job after its last optimizer step, in the host's memory: nothing that the job does later changes it.
struct JobState {
  JobId job = 0;
  std::int64_t step = 0;
  AdapterConfig adapter;
  std::vector<AdapterTensor> tensors;
  std::optional<std::string> position;  // the text of the state file; none of a job that has ended, or if left out
  std::vector<float> moments;           // of the optimizer
};
/// `whole`: what a checkpoint needs, not the adapter alone.
JobState copy_state(const TrainingJob& job, const Adapter& adapter, bool whole);
/// The directory appears whole or not at all.
void write_checkpoint(const std::string& directory, const JobState& state);
/// Throws ModelLoadError that names the file, for numbers that no job can have too.
Checkpoint read_checkpoint(const std::string& directory);
/// Into the job's allocated optimizer state.
void read_optimizer_state(const std::string& directory, TrainingJob& job, const Adapter& adapter);

}  // namespace flexcore
