#pragma once

#include <string>
#include <vector>

#include "engine/impl.h"
#include "flexcore/plan.h"

namespace flexcore {

/// What is to be planned beside the model itself; `program` is null when only serving.
struct ParallelWork {
  const TrainingProgram* program = nullptr;
  std::vector<AdapterModule> modules;
  std::int64_t tokens_in_flight = 0;  // of training sequences
  std::int64_t tokens_per_step = 0;   // of an optimizer step
  std::int64_t kv_pages = 0;          // bytes, of all heads
};

/// Throws InvalidArgument that names the field.
void check(const ParallelOptions& options);
/// Throws Unsupported where the model does not divide by the ranks.
ParallelPlan plan_parallel(const ModelConfig& model, const EngineSizes& sizes, const CompiledModel& compiled,
                           const ParallelWork& work, const ParallelOptions& options);
std::string describe(const ParallelPlan& plan);

}  // namespace flexcore
