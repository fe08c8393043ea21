#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "flexcore/config.h"
#include "flexcore/error.h"

namespace flexcore {

using RequestId = std::int64_t;
using JobId = std::int64_t;

enum class FinishReason : std::uint8_t { kNone, kStop, kLength, kCancelled, kError };

/// One new token of one request.
struct TokenEvent {
  RequestId request_id = 0;
  std::int32_t token_id = -1;  // -1 when the request was cancelled or failed
  float logprob = 0.0f;        // of the raw logits
  FinishReason finish_reason = FinishReason::kNone;
  std::vector<std::pair<std::int32_t, float>> top_logprobs;  // most likely first, when asked for
  std::vector<float> prompt_logprobs;                        // with the first token, when asked for; [prompt - 1]
  std::int64_t num_cached_tokens = 0;                        // of the prompt, found in the prefix cache
  double queue_ms = 0.0;                                     // from arrival to the first step that worked on it
  double ttft_ms = 0.0;                                      // from arrival to the first token; 0: none came
  std::string error;                                         // why, with kError: this request alone failed
};

enum class JobStatus : std::uint8_t { kQueued, kRunning, kPaused, kSucceeded, kFailed, kCancelled };
std::string job_status_name(JobStatus status);  // "queued", "running", ...

/// One optimizer step of a job, or a change of its status.
struct FinetuneEvent {
  JobId job_id = 0;
  std::int64_t step = 0;           // optimizer steps done
  double loss = 0.0;               // mean over the step's target tokens
  std::int64_t target_tokens = 0;  // of the step
  double learning_rate = 0.0;
  double grad_norm = 0.0;  // before clipping
  JobStatus status = JobStatus::kRunning;
};

struct StepReport {
  std::vector<TokenEvent> outputs;
  std::vector<FinetuneEvent> finetune;
  std::int64_t num_decode_tokens = 0;
  std::int64_t num_prefill_tokens = 0;
  std::int64_t num_finetune_forward_tokens = 0;
  std::int64_t num_finetune_backward_tokens = 0;  // tokens x layers / num_layers, rounded down
  std::int64_t num_backward_units = 0;            // (layer, window) pieces
  double predicted_ms = 0.0;
  double predicted_upper_ms = 0.0;  // with the margin that objectives are kept by
  double elapsed_ms = 0.0;
  std::string explain;  // one line: why this mix
};

struct AdapterInfo {
  std::string name;
  std::int64_t version = 0;  // grows by one with every published training step
  std::string peft_type;     // "LORA", "IA3", "BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING"
  std::int64_t rank = 0;     // the largest of its modules
  std::vector<std::string> target_modules;
  std::int64_t bytes = 0;
  bool training = false;
};

struct JobInfo {
  JobId id = 0;
  std::string adapter;
  JobStatus status = JobStatus::kQueued;
  std::int64_t step = 0, total_steps = 0, epoch = 0;
  double loss = 0.0;
  std::int64_t trained_tokens = 0;
  std::string error;
};

/// Result of loss_and_gradients: float32 arrays under PEFT's parameter names.
struct NamedArray {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};

struct LossAndGradients {
  double loss = 0.0;
  std::vector<NamedArray> gradients;
};

/// What a model is, for tools that show it.
struct ModelInfo {
  std::string architecture;  // config.json's architectures[0]
  std::string device, dtype;
  std::string quantization;                  // of the layers' linears: "none", "int8", "int4", "nf4"
  std::int64_t quantization_group_size = 0;  // 0 with "none"
  std::int64_t num_layers = 0, hidden_size = 0, intermediate_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t vocab_size = 0, max_position_embeddings = 0, num_parameters = 0;
  std::vector<std::int32_t> eos_token_ids;
  std::int64_t num_blocks = 0, block_size = 0, max_model_len = 0;
  int num_threads = 0;
};

struct JobState;

/// A finetuning job after an optimizer step, in the host's memory: written at leisure, on any thread, while the job and
/// the engine go on.
class JobSnapshot {
 public:
  explicit JobSnapshot(std::shared_ptr<const JobState> state);
  std::int64_t step() const;
  /// As Engine::save_checkpoint and Engine::save_adapter. Refused where the optimizer state was left out.
  void save_checkpoint(const std::string& directory) const;
  void save_adapter(const std::string& directory) const;  // PEFT

 private:
  std::shared_ptr<const JobState> state_;
};

/// Serves and finetunes one model. Any thread may call it; calls queue up.
class Engine {
 public:
  /// `model`: a Hugging Face directory (config.json and safetensors). Throws ModelLoadError, Unsupported,
  /// InvalidArgument, OutOfMemory.
  static Engine load(const std::string& model, const EngineConfig& config = {});
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;
  ~Engine();

  /// Queues a request. With sampling.n > 1 the ids are consecutive from the one returned.
  RequestId submit(const Request& request);
  /// All or none.
  std::vector<RequestId> submit_batch(const std::vector<Request>& requests);
  /// One iteration: inference first, then as much finetuning as the objective leaves room for.
  StepReport step();
  /// Frees the request's pages at once; its last event, "cancelled", comes with the next step. False: no such running
  /// request.
  bool cancel(RequestId request);
  bool has_work() const;  // anything to serve, or a job that runs

  /// It changes nothing yet.
  void create_adapter(const std::string& name, const AdapterConfig& config, std::uint64_t seed = 0);
  void create_adapter(const std::string& name, const LoraConfig& config, std::uint64_t seed = 0) {
    create_adapter(name, AdapterConfig(config), seed);
  }
  void load_adapter(const std::string& name, const std::string& directory);  // PEFT
  void save_adapter(const std::string& name, const std::string& directory) const;
  std::vector<AdapterInfo> adapters() const;
  /// Refused while the adapter trains. Its memory is freed when the last request on it ends.
  void unload_adapter(const std::string& name);

  JobId finetune(const std::string& adapter, std::vector<Example> examples, const FinetuneConfig& config = {});
  JobInfo job(JobId id) const;
  std::vector<JobInfo> jobs() const;
  void pause_job(JobId id);
  void resume_job(JobId id);
  void cancel_job(JobId id);
  /// Adapter, optimizer state and position, as of the last optimizer step. Written whole or not at all.
  void save_checkpoint(JobId id, const std::string& directory) const;
  /// The same, copied; without `optimizer`, or of a job that has ended, the adapter alone. Costs 12 or 4 bytes of host
  /// memory a parameter.
  JobSnapshot snapshot_job(JobId id, bool optimizer = true) const;
  /// Goes on from a checkpoint with the same losses as without the break. `examples` must be those of the first call.
  JobId resume_finetune(const std::string& directory, std::vector<Example> examples);

  /// float32 [len - 1]: log p(token i+1 | tokens <= i), by the serving path.
  std::vector<float> score(const std::vector<std::int32_t>& token_ids, const std::string& adapter = {});
  /// float32 [len, vocab_size] logits by the serving path, row-major.
  std::vector<float> logits(const std::vector<std::int32_t>& token_ids, const std::string& adapter = {});
  /// Loss (mean over target tokens) and gradients of every adapter tensor, without an optimizer step. `window_tokens`
  /// and `backward_window_tokens` cut the sequences; 0: one window. With `dropout_seed` the adapter's dropout is
  /// active, and examples are numbered from 0 (flexcore::ops::dropout).
  LossAndGradients loss_and_gradients(const std::string& adapter, const std::vector<Example>& examples,
                                      std::int64_t window_tokens = 0, std::int64_t backward_window_tokens = 0,
                                      std::optional<std::uint64_t> dropout_seed = {});

  std::map<std::string, std::int64_t> memory() const;       // bytes by tag
  std::map<std::string, std::int64_t> memory_peak() const;  // since load
  std::map<std::string, double> stats() const;              // counters and the step-time model's state
  ModelInfo model() const;
  /// Changes an objective, of running requests too; a name that is new becomes a class.
  void set_slo(const SLO& slo, const std::string& slo_class = {});
  /// EngineConfig::policy, from the next step on.
  void set_policy(const std::string& policy);
  /// EngineConfig::finetune_memory_bytes, for the sequences that begin from now on.
  void set_finetune_memory(std::optional<std::int64_t> bytes);

  struct Impl;  // defined inside the library

 private:
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace flexcore
