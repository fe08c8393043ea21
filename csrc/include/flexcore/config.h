#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace flexcore {

/// Latency objective of a request class.
struct SLO {
  double tpot_ms = 100.0;    // time per output token after the first, mean over a request
  double ttft_ms = 2000.0;   // time to first token, from arrival, queueing included
  double attainment = 0.99;  // share of requests that both are promised to; sets the margin of predictions
};

struct EngineConfig {
  std::string device = "auto";  // "auto" (FLEXCORE_DEVICE, a GPU if there is one, or the CPU), "cpu", "cuda", "cuda:1"
  std::string dtype = "bfloat16";  // of weights, keys and values, activations; "float32" is the exact mode
  std::int64_t max_model_len = 2048;
  std::int64_t max_num_seqs = 64;             // sequences that run at once, finetuning included
  std::int64_t max_num_batched_tokens = 512;  // rows of one forward pass
  std::int64_t block_size = 16;               // tokens of a page
  std::optional<std::int64_t>
      kv_cache_memory_bytes;  // the pool of pages: keys and values of requests and of training sequences, and what
                              // these keep for their backward. Default: max_num_seqs sequences of max_model_len within
                              // a quarter of memory, and room for finetune_memory_bytes, or for 1,024 tokens or a
                              // sequence of max_model_len in training within half of it
  std::optional<std::int64_t> swap_space_bytes;  // page-locked host memory for what of finetuning's the pool has no
                                                 // room for: activations of sequences too long for it, and pages when
                                                 // requests need them. Default: on a GPU as much as the pool has for
                                                 // training, up to 4 GiB and an eighth of host memory; on a CPU none
  std::optional<std::int64_t> finetune_memory_bytes;  // saved activations and gradients in flight on the device;
                                                      // sequences that do not fit recompute, or keep in the swap space,
                                                      // what costs least time; default: no limit of its own
  /// How activations wait for their backward: "exact", or "int8", in groups of 64 with a minimum and a step each: a bit
  /// more than a byte an element, and gradients that are off by the rounding. To compare with: "read" also keeps what
  /// could be rebuilt, "all" everything that is made.
  std::string finetune_activations = "exact";
  bool enable_prefix_caching = true;
  bool enforce_eager = false;  // on a GPU: launch the kernels of every step one by one, without CUDA graphs
  int num_threads = 0;         // 0: every core this process may use
  std::uint64_t seed = 0;
  SLO slo;
  std::map<std::string, SLO> slo_classes = {};  // for requests that name one of them
  /// How requests and finetuning share the steps: "hybrid"; or, to compare with it, "temporal:N" (a turn of finetuning
  /// after N inference steps), "dynamic-temporal", "token-cap:N", "inference-only", "finetune-only".
  std::string policy = "hybrid";
  double min_finetune_share = 0.02;  // of the time, even when objectives leave none
  /// Frozen linears of the layers as codes, for serving and finetuning alike: "int8", "int4" (a minimum and a scale for
  /// each group of inputs), "nf4" (QLoRA's). Embedding, output layer, norms, biases and adapters keep their dtype.
  std::optional<std::string> quantization = std::nullopt;  // default, and "none": none
  std::int64_t quantization_group_size = 64;               // a multiple of 16; the last group of a row may be short
};

/// How tokens are chosen. Applied in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
struct SamplingParams {
  std::int64_t max_tokens = 16;
  std::int64_t min_tokens = 0;  // no end of sequence before this many
  double temperature = 1.0;     // 0: greedy
  double top_p = 1.0;
  std::int64_t top_k = 0;  // 0 or -1: all
  double min_p = 0.0;
  double presence_penalty = 0.0;
  double frequency_penalty = 0.0;
  double repetition_penalty = 1.0;
  std::vector<std::int32_t> stop_token_ids;
  bool ignore_eos = false;
  std::optional<std::uint64_t> seed;          // default: drawn from the engine's seed and the request's id
  std::int64_t n = 1;                         // answers a prompt; ids of the others follow the first
  std::optional<std::int64_t> logprobs;       // k: with every token, the k most likely
  bool prompt_logprobs = false;               // with the first token: log p of each prompt token after the first
  std::map<std::int32_t, double> logit_bias;  // token -> added to its logit
};

struct Request {
  std::vector<std::int32_t> prompt_token_ids;
  SamplingParams sampling = {};
  std::string adapter = {};                     // "" is the base model; "name" the newest version
  std::string slo_class = {};                   // "" is EngineConfig::slo
  double waited_ms = 0.0;                       // since it arrived, before it was submitted: counts to its first token
  std::optional<std::int64_t> max_tokens = {};  // short for sampling.max_tokens, which it goes before
};

/// A LoRA adapter (Hu et al. 2021): W x + scaling * B A x, scaling = alpha / r, or alpha / sqrt(r) with use_rslora.
struct LoraConfig {
  std::int64_t r = 8;
  double lora_alpha = 8.0;
  std::vector<std::string> target_modules = {"all-linear"};  // names, suffixes of module paths, or one "all-linear"
  bool target_modules_is_regex = false;  // the one entry is a regular expression over the whole path
  bool use_rslora = false;
  std::vector<std::pair<std::string, std::int64_t>> rank_pattern = {};  // first match wins, as in PEFT
  std::vector<std::pair<std::string, double>> alpha_pattern = {};
  double lora_dropout = 0.0;  // of x on its way to A, with DoRA to W too; in finetuning alone
  /// Modules that are trained whole, copies of the base model's: "embed_tokens", "lm_head".
  std::vector<std::string> modules_to_save = {};
  bool use_dora = false;  // DoRA (arXiv 2402.09353): magnitude * (W + scaling * B A) / its norms, row by row
};

/// (IA)^3 (arXiv 2205.05638): vectors that scale what linears make, or what feedforward_modules read.
struct IA3Config {
  std::vector<std::string> target_modules = {"k_proj", "v_proj", "down_proj"};
  bool target_modules_is_regex = false;
  std::vector<std::string> feedforward_modules = {"down_proj"};  // of the targets
  bool feedforward_modules_is_regex = false;
};

/// Bottleneck adapters (Houlsby et al., arXiv 1902.00751): y += scaling * W_up act(W_down y), y being what a linear
/// makes; with use_parallel_adapter (He et al., arXiv 2110.04366) W_down reads what the linear reads.
struct BottleneckConfig {
  std::int64_t bottleneck_size = 256;
  std::string non_linearity = "tanh";  // "relu", "tanh", "gelu", "silu"
  double scaling = 1.0;
  bool use_parallel_adapter = false;
  std::vector<std::string> target_modules = {"o_proj", "down_proj"};  // "all-linear" too
  bool target_modules_is_regex = false;
};

/// Prompt tuning (Lester et al., arXiv 2104.08691): trainable embeddings ahead of every sequence. They take positions
/// and pages as tokens do.
struct PromptTuningConfig {
  std::int64_t num_virtual_tokens = 20;
  std::vector<std::int32_t> init_token_ids = {};  // whose embeddings are the first ones, in turn; empty: random
  std::int64_t token_dim = 0, num_layers = 0, num_attention_heads = 0;  // as PEFT's files say them; 0: the model's
};

/// Prefix tuning (Li and Liang, arXiv 2101.00190), without a projection: trainable keys and values of every layer ahead
/// of every sequence, at positions of their own.
struct PrefixTuningConfig {
  std::int64_t num_virtual_tokens = 20;
  std::int64_t token_dim = 0, num_layers = 0, num_attention_heads = 0;  // of keys; 0: the model's
};

using AdapterConfig = std::variant<LoraConfig, IA3Config, BottleneckConfig, PromptTuningConfig, PrefixTuningConfig>;

/// One training sequence. labels[i] is the token at i if it is a target, -100 if not; the next-token shift is done
/// inside.
struct Example {
  std::vector<std::int32_t> input_ids;
  std::vector<std::int32_t> labels;
};

struct FinetuneConfig {
  std::int64_t num_epochs = 1;
  std::int64_t batch_size = 8;  // examples of one optimizer step
  double learning_rate = 2e-4;
  std::string optimizer = "adamw";  // "adamw", "sgd"
  double weight_decay = 0.0;
  std::array<double, 2> betas = {0.9, 0.999};
  double eps = 1e-8;
  double max_grad_norm = 1.0;             // 0: no clipping
  std::string lr_scheduler = "constant";  // "constant", "linear", "cosine", after the warm-up
  double warmup_ratio = 0.0;
  bool shuffle = true;
  std::uint64_t seed = 0;
  std::optional<std::int64_t> window_tokens;           // default: the scheduler decides
  std::optional<std::int64_t> backward_window_tokens;  // default: the scheduler decides
  double weight = 1.0;                                 // share of finetuning time among jobs
};

}  // namespace flexcore
