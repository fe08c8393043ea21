#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/scratch.h"
#include "compile/compiled_model.h"
#include "engine/executor.h"
#include "flexcore/engine.h"
#include "memory/arena.h"
#include "model/config.h"
#include "model/weight_store.h"
#include "ops/registry.h"
#include "ops/sampling.h"
#include "peft/adapter_store.h"
#include "sched/scheduler.h"
#include "train/job.h"

namespace flexcore {

/// What statistics call the class of requests that name none.
inline constexpr std::string_view kDefaultClass = "default";

/// A request from submission to its last token.
struct RequestState {
  Sequence sequence;
  SamplingParams sampling;
  std::shared_ptr<Adapter> adapter;  // the version that it began with; null: base model
  std::uint64_t seed = 0;
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  std::vector<std::int32_t> end_tokens;  // that end it
  std::vector<float> prompt_logprobs;    // [prompt - 1] if they are wanted

  std::int64_t num_virtual_tokens() const { return adapter == nullptr ? 0 : adapter->layout.num_virtual_tokens; }
  std::int64_t num_cached_tokens() const {  // of the prompt as it was given
    return std::max<std::int64_t>(0, sequence.num_cached_tokens - num_virtual_tokens());
  }
};

/// Sizes that follow from a model, a configuration and the machine, before anything is allocated; the engine and its
/// plan take them from here.
struct EngineSizes {
  DType compute = DType::kBFloat16;
  WeightFormat linears;  // of the layers
  Device device;
  std::int64_t max_model_len = 0;
  std::int64_t block_bytes = 0;  // of all layers
  ExecutorLimits limits;
  std::int64_t num_parameters = 0;
};
EngineSizes engine_sizes(const ModelConfig& model, const EngineConfig& config);
/// The model without bypasses.
Graph base_graph(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes);
RowCounts row_capacity(const ExecutorLimits& limits);
/// On a GPU one product for q, k and v is faster than three; the CPU's kernels share x among members themselves.
inline bool joins_outputs(Device device) { return device.kind != DeviceKind::kCpu; }
/// With the tokens in flight that finetune_memory_bytes allows.
SchedulerConfig scheduler_config(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                                 CompiledModel& compiled);
/// What one training sequence of `length` tokens keeps on the device for its backward.
std::int64_t finetune_bytes(const ModelConfig& model, const TrainingProgram& program, std::int64_t length);
/// Sets the blocks of the pool: what kv_cache_memory_bytes says or, without it, room for the requests and for as much
/// training as finetune_memory_bytes, or the tokens that may be in flight, take, as far as the device has it beside the
/// weights and the workspace. And those of host memory.
void size_pool(const ModelConfig& model, const EngineConfig& config, CompiledModel& compiled, EngineSizes& sizes);
std::int64_t weight_bytes(const CompiledModel& compiled, const EngineSizes& sizes);
/// Of one version of an adapter.
std::int64_t adapter_bytes(const AdapterLayout& layout, const EngineSizes& sizes);
/// Of all workspaces of an engine that is ready for LoRA at every linear, which it is when it is loaded.
std::int64_t workspace_bytes(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                             CompiledModel& compiled);
/// What the programs of a training step run in.
std::int64_t programs_bytes(CompiledModel& compiled, const TrainingProgram& program, const EngineSizes& sizes);
/// The pages of the pool that it keeps that in, and those of host memory for what it keeps there.
struct StoreBlocks {
  std::int64_t device = 0, host = 0;
};
StoreBlocks store_blocks(const ModelConfig& model, const EngineSizes& sizes, const TrainingProgram& program,
                         std::int64_t length);
/// By what operators take on such a device, relative to each other: what is recomputed depends on nothing that was
/// measured, so that a plan says what an engine does.
OperatorRates operator_rates(const EngineSizes& sizes);
/// The fastest of the backward programs with which a sequence keeps no more than finetune_memory_bytes and the pool
/// leave it, and no more in host memory than the swap space has; null: none.
TrainingProgram* find_program(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                              CompiledModel& compiled, const BypassSet& bypasses, std::int64_t length);
/// The longest sequence, up to max_model_len, that there is one for.
std::int64_t longest_sequence(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                              CompiledModel& compiled, const BypassSet& bypasses);
/// As find_program. Where there is none: InvalidArgument, which begins with `what` and says how long a sequence may be.
TrainingProgram& fitting_program(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                                 CompiledModel& compiled, const BypassSet& bypasses, std::int64_t length,
                                 const std::string& what);
ScratchBytes scratch_bytes(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes);
/// Throws InvalidArgument that names the field.
void check(const EngineConfig& config);
void check(const SLO& slo, const std::string& name);
/// "auto" is what FLEXCORE_DEVICE says, or a GPU if there is one, or the CPU. Throws InvalidArgument.
Device parse_device(const std::string& name);
/// What `graph` wants of a checkpoint.
std::vector<WeightSpec> weight_specs(const Graph& graph);

struct Engine::Impl {
  Impl(const std::string& model_path, const EngineConfig& config);
  ~Impl();

  /// One public call at a time, with the device made the calling thread's.
  class Entry {
   public:
    explicit Entry(const Impl& impl);

   private:
    std::lock_guard<std::mutex> lock_;
    std::shared_ptr<void> entered_;
  };

  // engine.cpp
  BlockManager pool();
  double now_ms() const;
  void set_slo(const SLO& slo, const std::string& name);
  std::uint64_t request_seed(RequestId id, const SamplingParams& sampling, std::int64_t index) const;
  void check_tokens(std::span<const std::int32_t> tokens, const char* argument) const;
  RequestId submit(const Request& request);
  void validate(const Request& request) const;
  std::int64_t num_virtual_tokens(const Request& request) const;
  std::int64_t max_total_tokens(const Request& request) const;
  void finish(RequestId id);
  void end_early(RequestId id, FinishReason reason, const std::string& error = {});
  void unload(const std::string& name);

  // step.cpp
  StepReport step();
  double move_blocks(const StepPlan& plan);
  void run_plan(StepPlan& plan, double begin_ms, StepReport& report);
  void count(const StepPlan& plan, StepReport& report);
  bool fail_training(const StepPlan& plan, const std::string& error);
  std::vector<SamplingResult> sample(const std::vector<RequestState*>& rows, const TensorView& logits,
                                     std::vector<std::vector<std::pair<std::int32_t, float>>>& top,
                                     std::vector<std::string>& errors);
  void emit_token(RequestState& request, const SamplingResult& result);
  void count_attainment(const Sequence& sequence);

  // finetune.cpp
  JobId start_job(const std::string& adapter, std::vector<Example> examples, const FinetuneConfig& config);
  JobId resume_finetune(const std::string& directory, std::vector<Example> examples);
  JobId begin(std::unique_ptr<TrainingJob> job);
  void validate(const std::vector<Example>& examples, const AdapterLayout& layout);
  TrainingJob& find_job(JobId id) const;
  void start_batch(TrainingJob& job);
  void finish_sequences(TrainingJob& job);
  void end_job(TrainingJob& job, JobStatus status, const std::string& error);
  void fail_job(TrainingJob& job, const std::string& error);
  std::int64_t program_id(const TrainingProgram& program);
  TrainState& state_of(const TrainSequence& sequence) const { return *in_flight.at(sequence.id)->state; }
  bool is_training(const std::string& adapter) const;

  // measure.cpp
  void forward_alone(std::span<const std::int32_t> tokens, const Adapter* adapter, float* scores, float* logits);
  LossAndGradients loss_and_gradients(const std::string& adapter, const std::vector<Example>& examples,
                                      std::int64_t window_tokens, std::int64_t backward_window_tokens,
                                      std::optional<std::uint64_t> dropout_seed);
  // calibrate.cpp
  void calibrate();
  void keep_step_times() const;

  mutable std::mutex mutex;
  EngineConfig config;
  ModelConfig model;
  EngineSizes sizes;
  MemoryLedger ledger;  // outlives everything that reserves
  ThreadPool threads;
  std::unique_ptr<DeviceRuntime> device;
  std::shared_ptr<void> entered;  // while the engine is made and while it ends
  Arena scratch;
  OpRegistry registry;
  OpContext context;
  CompiledModel compiled;
  WeightStore weights;
  AdapterStore adapters;
  std::unique_ptr<Executor> executor;
  CostModel cost;
  BlockManager blocks;
  Scheduler scheduler;

  struct Attainment {
    double requests = 0, kept_ttft = 0, kept_tpot = 0, kept = 0;  // that ended with their last token
  };
  std::map<std::string, std::int64_t> slo_classes;  // the scheduler's index; "" is 0
  std::vector<Attainment> attainment;               // by that index
  std::map<RequestId, std::unique_ptr<RequestState>> requests;
  std::vector<TokenEvent> token_events;  // to be reported when a step ends
  RequestId next_request = 1;
  std::map<JobId, std::unique_ptr<TrainingJob>> jobs;
  std::vector<FinetuneEvent> job_events;  // to be reported when a step ends
  JobId next_job = 1;
  struct InFlight {
    TrainSequence sequence;  // the scheduler's view
    TrainState* state = nullptr;
  };
  std::map<std::int64_t, std::unique_ptr<InFlight>> in_flight;  // training sequences, by id
  std::map<const TrainingProgram*, std::int64_t> program_ids;
  std::int64_t next_train_sequence = 1;
  std::map<std::string, double> counters;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
};

}  // namespace flexcore
