#pragma once

#include <cstdint>
#include <string>

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

/// The state after the last optimizer step. The directory appears whole or not at all.
void write_checkpoint(const std::string& directory, const TrainingJob& job, const Adapter& adapter);
/// Throws ModelLoadError that names the file, for numbers that no job can have too.
Checkpoint read_checkpoint(const std::string& directory);
/// Into the job's allocated optimizer state.
void read_optimizer_state(const std::string& directory, TrainingJob& job, const Adapter& adapter);

}  // namespace flexcore
