#include "flexcore/config.h"

#include "record.h"
#include "register.h"

namespace flexcore::python {
namespace {

constexpr const char* kAllLinear = "all-linear";

// As in PEFT: a list of names, one regular expression over the whole path, or "all-linear".
template <auto names, auto is_regex, class Config>
void modules_property(Record<Config>& record, const char* field) {
  record.property(
      field,
      [](const Config& config) -> py::object {
        const auto& all = config.*names;
        if (all.size() == 1 && (config.*is_regex || all[0] == kAllLinear)) return py::str(all[0]);
        return to_python(all);
      },
      [](Config& config, py::handle value, const std::string& where) {
        config.*names = to_strings(value, where);
        config.*is_regex = py::isinstance<py::str>(value) && (config.*names)[0] != kAllLinear;
      });
}

void register_engine_config(py::module_& m) {
  Record<SLO>(
      m, "SLO",
      "Latency objective: milliseconds per output token (mean of a request) and to the first token, kept for this "
      "share of requests.")
      .field("tpot_ms", &SLO::tpot_ms)
      .field("ttft_ms", &SLO::ttft_ms)
      .field("attainment", &SLO::attainment)
      .done();
  Record<EngineConfig>(m, "EngineConfig",
                       "How an engine runs. dtype \"float32\" is the exact mode; num_threads 0 takes every core; "
                       "quantization stores the layers' linears as \"int8\", \"int4\" or \"nf4\".")
      .field("device", &EngineConfig::device)
      .field("dtype", &EngineConfig::dtype)
      .field("max_model_len", &EngineConfig::max_model_len)
      .field("max_num_seqs", &EngineConfig::max_num_seqs)
      .field("max_num_batched_tokens", &EngineConfig::max_num_batched_tokens)
      .field("block_size", &EngineConfig::block_size)
      .field("kv_cache_memory_bytes", &EngineConfig::kv_cache_memory_bytes)
      .field("swap_space_bytes", &EngineConfig::swap_space_bytes)
      .field("finetune_memory_bytes", &EngineConfig::finetune_memory_bytes)
      .field("finetune_activations", &EngineConfig::finetune_activations)
      .field("enable_prefix_caching", &EngineConfig::enable_prefix_caching)
      .field("enforce_eager", &EngineConfig::enforce_eager)
      .field("num_threads", &EngineConfig::num_threads)
      .field("seed", &EngineConfig::seed)
      .nested("slo", &EngineConfig::slo)
      .field("slo_classes", &EngineConfig::slo_classes)
      .field("policy", &EngineConfig::policy)
      .field("min_finetune_share", &EngineConfig::min_finetune_share)
      .field("quantization", &EngineConfig::quantization)
      .field("quantization_group_size", &EngineConfig::quantization_group_size)
      .done();
}

void register_sampling(py::module_& m) {
  using Sampling = TextSamplingParams;
  Record<Sampling>(m, "SamplingParams",
                   "How tokens are chosen. temperature 0 is greedy; stop strings are applied by flexcore.LLM.")
      .field("max_tokens", &Sampling::max_tokens)
      .field("min_tokens", &Sampling::min_tokens)
      .field("temperature", &Sampling::temperature)
      .field("top_p", &Sampling::top_p)
      .field("top_k", &Sampling::top_k)
      .field("min_p", &Sampling::min_p)
      .field("presence_penalty", &Sampling::presence_penalty)
      .field("frequency_penalty", &Sampling::frequency_penalty)
      .field("repetition_penalty", &Sampling::repetition_penalty)
      .field("stop", &Sampling::stop)
      .field("stop_token_ids", &Sampling::stop_token_ids)
      .field("ignore_eos", &Sampling::ignore_eos)
      .field("seed", &Sampling::seed)
      .field("n", &Sampling::n)
      .field("logprobs", &Sampling::logprobs)
      .field("prompt_logprobs", &Sampling::prompt_logprobs)
      .field("logit_bias", &Sampling::logit_bias)
      .done();
}

void register_adapters(py::module_& m) {
  Record<LoraConfig> lora(
      m, "LoraConfig",
      "A LoRA adapter (Hu et al. 2021): W x + scaling * B A x. target_modules as in PEFT: a list of names, a "
      "regular expression, or \"all-linear\"; \"embed_tokens\" and \"lm_head\" by name. modules_to_save: of these "
      "two, those that are trained whole. lora_dropout acts in finetuning alone; use_dora: DoRA (Liu et al. "
      "2024).");
  lora.field("r", &LoraConfig::r).field("lora_alpha", &LoraConfig::lora_alpha);
  modules_property<&LoraConfig::target_modules, &LoraConfig::target_modules_is_regex>(lora, "target_modules");
  lora.field("use_rslora", &LoraConfig::use_rslora)
      .field("rank_pattern", &LoraConfig::rank_pattern)
      .field("alpha_pattern", &LoraConfig::alpha_pattern)
      .field("lora_dropout", &LoraConfig::lora_dropout)
      .field("modules_to_save", &LoraConfig::modules_to_save)
      .field("use_dora", &LoraConfig::use_dora)
      .done();
  Record<IA3Config> ia3(m, "IA3Config",
                        "An (IA)^3 adapter (Liu et al. 2022): vectors that scale what the targets make, or what those "
                        "among feedforward_modules read.");
  modules_property<&IA3Config::target_modules, &IA3Config::target_modules_is_regex>(ia3, "target_modules");
  modules_property<&IA3Config::feedforward_modules, &IA3Config::feedforward_modules_is_regex>(ia3,
                                                                                              "feedforward_modules");
  ia3.done();
  Record<BottleneckConfig> bottleneck(
      m, "BottleneckConfig",
      "A bottleneck adapter (Houlsby et al. 2019): y + scaling * W_up act(W_down y) behind every target; with "
      "use_parallel_adapter of what the target reads. non_linearity: \"relu\", \"tanh\", \"gelu\" or \"silu\".");
  bottleneck.field("bottleneck_size", &BottleneckConfig::bottleneck_size)
      .field("non_linearity", &BottleneckConfig::non_linearity)
      .field("scaling", &BottleneckConfig::scaling)
      .field("use_parallel_adapter", &BottleneckConfig::use_parallel_adapter);
  modules_property<&BottleneckConfig::target_modules, &BottleneckConfig::target_modules_is_regex>(bottleneck,
                                                                                                  "target_modules");
  bottleneck.done();
  Record<PromptTuningConfig>(m, "PromptTuningConfig",
                             "Prompt tuning (Lester et al. 2021): trainable embeddings ahead of every sequence, which "
                             "begin as those of init_token_ids, if there are any. The last three are the model's.")
      .field("num_virtual_tokens", &PromptTuningConfig::num_virtual_tokens)
      .field("init_token_ids", &PromptTuningConfig::init_token_ids)
      .field("token_dim", &PromptTuningConfig::token_dim)
      .field("num_layers", &PromptTuningConfig::num_layers)
      .field("num_attention_heads", &PromptTuningConfig::num_attention_heads)
      .done();
  Record<PrefixTuningConfig>(
      m, "PrefixTuningConfig",
      "Prefix tuning (Li and Liang 2021), without a projection: trainable keys and values of every "
      "layer ahead of every sequence. The last three are the model's.")
      .field("num_virtual_tokens", &PrefixTuningConfig::num_virtual_tokens)
      .field("token_dim", &PrefixTuningConfig::token_dim)
      .field("num_layers", &PrefixTuningConfig::num_layers)
      .field("num_attention_heads", &PrefixTuningConfig::num_attention_heads)
      .done();
}

void register_finetune(py::module_& m) {
  Record<Example>(m, "Example",
                  "One training sequence. labels[i] is the token at i if it is a target, -100 if not; same length as "
                  "input_ids, the shift is done inside.")
      .field("input_ids", &Example::input_ids)
      .field("labels", &Example::labels)
      .done();
  Record<FinetuneConfig>(
      m, "FinetuneConfig",
      "One finetuning job. batch_size counts examples of an optimizer step; max_grad_norm 0 does not clip.")
      .field("num_epochs", &FinetuneConfig::num_epochs)
      .field("batch_size", &FinetuneConfig::batch_size)
      .field("learning_rate", &FinetuneConfig::learning_rate)
      .field("optimizer", &FinetuneConfig::optimizer)
      .field("weight_decay", &FinetuneConfig::weight_decay)
      .field("betas", &FinetuneConfig::betas)
      .field("eps", &FinetuneConfig::eps)
      .field("max_grad_norm", &FinetuneConfig::max_grad_norm)
      .field("lr_scheduler", &FinetuneConfig::lr_scheduler)
      .field("warmup_ratio", &FinetuneConfig::warmup_ratio)
      .field("shuffle", &FinetuneConfig::shuffle)
      .field("seed", &FinetuneConfig::seed)
      .field("window_tokens", &FinetuneConfig::window_tokens)
      .field("backward_window_tokens", &FinetuneConfig::backward_window_tokens)
      .field("weight", &FinetuneConfig::weight)
      .done();
}

}  // namespace

void register_config(py::module_& m) {
  register_engine_config(m);
  register_sampling(m);
  register_adapters(m);
  register_finetune(m);
}

}  // namespace flexcore::python
