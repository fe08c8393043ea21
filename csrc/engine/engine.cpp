#include "flexcore/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "backends/register.h"
#include "core/check.h"
#include "core/philox.h"
#include "engine/impl.h"
#include "model/safetensors.h"
#include "peft/attach.h"
#include "train/checkpoint.h"

namespace flexcore {

std::string job_status_name(JobStatus status) {
  switch (status) {
    case JobStatus::kQueued:
      return "queued";
    case JobStatus::kRunning:
      return "running";
    case JobStatus::kPaused:
      return "paused";
    case JobStatus::kSucceeded:
      return "succeeded";
    case JobStatus::kFailed:
      return "failed";
    case JobStatus::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

// Until pages were copied and timed: PCI Express 4.0 x16, both ways alike.
constexpr double kHostBytesPerMs = 25e6;

Engine::Impl::Impl(const std::string& model_path, const EngineConfig& config_)
    : config(config_),
      model(ModelConfig::load(model_path)),
      sizes(engine_sizes(model, config)),
      threads(config.num_threads),
      device(open_device(sizes.device)),
      entered(device->enter()),
      scratch(device->allocator(), ledger),
      registry(make_op_registry()),
      context{&registry, sizes.device, &threads, &scratch, device->stream()},
      compiled(base_graph(model, config, sizes), attach_bypasses, row_capacity(sizes.limits),
               joins_outputs(sizes.device)),
      weights(context, device->allocator(), ledger, sizes.compute, sizes.linears),
      adapters(compiled.base(), context, weights, device->allocator(), ledger),
      blocks(pool()),
      scheduler(scheduler_config(model, config, sizes, compiled), blocks, cost) {
  compiled.set_rates(operator_rates(sizes));
  const ScratchBytes scratch_sizes = scratch_bytes(model, config, sizes);
  scratch.reserve(static_cast<std::size_t>(scratch_sizes.forward));
  weights.load(SafetensorsModel(model_path), weight_specs(compiled.base()));
  executor = std::make_unique<Executor>(context, *device, ledger, compiled, weights, model, sizes.compute, sizes.limits,
                                        scratch_sizes, !config.enforce_eager);
  executor->reserve(compiled.training(compiled.lora_everywhere()));  // whether there is time to measure it or not
  slo_classes.emplace("", 0);
  for (const auto& [name, slo] : config.slo_classes)
    slo_classes.emplace(name, static_cast<std::int64_t>(slo_classes.size()));
  attainment.resize(slo_classes.size());
  calibrate();
  entered.reset();
}

BlockManager Engine::Impl::pool() {
  size_pool(model, config, compiled, sizes);
  cost.set_swap_ms(static_cast<double>(sizes.block_bytes) / kHostBytesPerMs);
  const ExecutorLimits& limits = sizes.limits;
  return {limits.num_blocks, limits.block_size, config.enable_prefix_caching, limits.num_host_blocks};
}

Engine::Impl::~Impl() {
  try {
    entered = device->enter();
    keep_step_times();
  } catch (const std::exception&) {  // the driver is going away, and its memory with it
  }
}

Engine::Impl::Entry::Entry(const Impl& impl) : lock_(impl.mutex), entered_(impl.device->enter()) {}

double Engine::Impl::now_ms() const {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

std::uint64_t Engine::Impl::request_seed(RequestId id, const SamplingParams& sampling, std::int64_t index) const {
  const std::uint64_t key = sampling.seed ? *sampling.seed : config.seed ^ 0x9E3779B97F4A7C15ull;
  if (sampling.seed && index == 0) return key;
  return random_bits(key, static_cast<std::uint64_t>(sampling.seed ? index : id));
}

void Engine::Impl::check_tokens(std::span<const std::int32_t> tokens, const char* argument) const {
  for (std::size_t i = 0; i < tokens.size(); ++i)
    require(tokens[i] >= 0 && tokens[i] < model.vocab_size, argument, ": unknown token id ", tokens[i], " at position ",
            i, ", wanted 0 <= id < ", model.vocab_size);
}

void Engine::Impl::validate(const Request& request) const {
  const auto& s = request.sampling;
  // Sampling takes floats, so that is what must be finite; NaN is not.
  const auto finite = [](double value) { return std::abs(value) <= std::numeric_limits<float>::max(); };
  require(!request.prompt_token_ids.empty(), "prompt_token_ids: empty, wanted at least one token");
  check_tokens(request.prompt_token_ids, "prompt_token_ids");
  const auto length = static_cast<std::int64_t>(request.prompt_token_ids.size());
  const std::int64_t ahead = num_virtual_tokens(request);
  require(length + ahead < sizes.max_model_len, "prompt_token_ids: ", length,
          " tokens, wanted fewer than max_model_len (", sizes.max_model_len, ")",
          ahead > 0 ? str(" less ", ahead, " virtual tokens") : "");
  require(std::isfinite(request.waited_ms) && request.waited_ms >= 0.0, "waited_ms: ", request.waited_ms,
          ", wanted >= 0");
  require(s.max_tokens >= 1, "max_tokens: ", s.max_tokens, ", wanted >= 1");
  require(s.min_tokens >= 0 && s.min_tokens <= s.max_tokens, "min_tokens: ", s.min_tokens, ", wanted 0 to max_tokens (",
          s.max_tokens, ")");
  require(finite(s.temperature) && s.temperature >= 0, "temperature: ", s.temperature,
          ", wanted >= 0 and finite as float32");
  require(static_cast<float>(s.top_p) > 0 && s.top_p <= 1, "top_p: ", s.top_p, ", wanted in (0, 1], as float32 too");
  require(s.top_k >= -1, "top_k: ", s.top_k, ", wanted -1 or 0 (off) or >= 1");
  require(s.min_p >= 0 && s.min_p <= 1, "min_p: ", s.min_p, ", wanted in [0, 1]");
  require(finite(s.presence_penalty), "presence_penalty: ", s.presence_penalty, ", wanted finite as float32");
  require(finite(s.frequency_penalty), "frequency_penalty: ", s.frequency_penalty, ", wanted finite as float32");
  require(finite(s.repetition_penalty) && static_cast<float>(s.repetition_penalty) > 0,
          "repetition_penalty: ", s.repetition_penalty, ", wanted > 0 and finite as float32");
  require(s.n >= 1 && s.n <= 1024, "n: ", s.n, ", wanted 1 to 1024");
  if (s.logprobs)
    require(*s.logprobs >= 0 && *s.logprobs <= model.vocab_size, "logprobs: ", *s.logprobs, ", wanted 0 to vocab_size");
  check_tokens(s.stop_token_ids, "stop_token_ids");
  for (const auto& [token, bias] : s.logit_bias) {
    check_tokens({&token, 1}, "logit_bias");
    require(bias <= 0 || finite(bias), "logit_bias: ", bias, " for token ", token,
            ", wanted -infinity or finite as float32");
  }
  require(slo_classes.contains(request.slo_class), "slo_class: \"", request.slo_class, "\" is not one of slo_classes");
  const std::int64_t tokens = max_total_tokens(request);
  const std::int64_t needed = (tokens + sizes.limits.block_size - 1) / sizes.limits.block_size;
  require(needed <= blocks.num_blocks(), "max_tokens: the request may grow to ", tokens, " tokens = ", needed,
          " pages, but the pool has ", blocks.num_blocks(), "; shorten it or raise kv_cache_memory_bytes");
}

std::int64_t Engine::Impl::num_virtual_tokens(const Request& request) const {
  return request.adapter.empty() ? 0 : adapters.get(request.adapter)->layout.num_virtual_tokens;
}

// Prompt and answer, and the virtual tokens ahead. max_tokens may be as large as its type, for "no limit".
std::int64_t Engine::Impl::max_total_tokens(const Request& request) const {
  const auto length = static_cast<std::int64_t>(request.prompt_token_ids.size()) + num_virtual_tokens(request);
  return length + std::min(request.sampling.max_tokens, sizes.max_model_len - length);
}

RequestId Engine::Impl::submit(const Request& request) {
  const RequestId first = next_request;
  for (std::int64_t index = 0; index < request.sampling.n; ++index) {
    const RequestId id = next_request++;
    auto state = std::make_unique<RequestState>();
    state->sampling = request.sampling;
    state->seed = request_seed(id, request.sampling, index);
    if (!request.adapter.empty()) state->adapter = adapters.get(request.adapter);
    for (const auto& [token, bias] : request.sampling.logit_bias)
      state->logit_bias.emplace_back(token, static_cast<float>(bias));
    state->end_tokens = request.sampling.stop_token_ids;
    if (!request.sampling.ignore_eos)
      state->end_tokens.insert(state->end_tokens.end(), model.eos_token_ids.begin(), model.eos_token_ids.end());
    Sequence& sequence = state->sequence;
    sequence.id = id;
    with_virtual_tokens(request.prompt_token_ids, state->num_virtual_tokens(), sequence.tokens);
    sequence.num_prompt_tokens = static_cast<std::int64_t>(sequence.tokens.size());
    sequence.max_total_tokens = max_total_tokens(request);
    sequence.cache_key = state->adapter ? state->adapter->cache_key() : 0;
    sequence.use_prefix_cache = config.enable_prefix_caching && !request.sampling.prompt_logprobs;
    if (request.sampling.prompt_logprobs) state->prompt_logprobs.resize(request.prompt_token_ids.size() - 1);
    sequence.slo_class = slo_classes.at(request.slo_class);
    sequence.arrival_ms = now_ms() - request.waited_ms;
    scheduler.add(&sequence);
    requests.emplace(id, std::move(state));
    counters["requests_submitted"] += 1;
  }
  return first;
}

void Engine::Impl::finish(RequestId id) {
  const auto request = requests.find(id);
  scheduler.finish(&request->second->sequence);
  requests.erase(request);
}

// Without a further token.
void Engine::Impl::end_early(RequestId id, FinishReason reason, const std::string& error) {
  const Sequence& sequence = requests.at(id)->sequence;
  TokenEvent event{.request_id = id, .finish_reason = reason, .error = error};
  event.num_cached_tokens = requests.at(id)->num_cached_tokens();
  if (sequence.first_token_ms >= 0) event.ttft_ms = sequence.first_token_ms - sequence.arrival_ms;
  token_events.push_back(std::move(event));
  finish(id);
}

void Engine::Impl::unload(const std::string& name) {
  const auto adapter = adapters.get(name);
  require(!is_training(name), "adapter \"", name, "\" is being trained; cancel its job first");
  adapters.remove(name);
  blocks.forget(adapter->cache_key());
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Engine Engine::load(const std::string& model, const EngineConfig& config) {
  return Engine(std::make_unique<Impl>(model, config));
}

RequestId Engine::submit(const Request& request) { return submit_batch({request}).front(); }

std::vector<RequestId> Engine::submit_batch(const std::vector<Request>& requests) {
  const Impl::Entry entry(*impl_);
  std::vector<Request> complete = requests;
  for (auto& request : complete) {
    request.sampling.max_tokens = request.max_tokens.value_or(request.sampling.max_tokens);
    impl_->validate(request);
  }
  std::vector<RequestId> ids;
  for (const auto& request : complete) ids.push_back(impl_->submit(request));
  return ids;
}

StepReport Engine::step() {
  const Impl::Entry entry(*impl_);
  return impl_->step();
}

bool Engine::cancel(RequestId id) {
  const Impl::Entry entry(*impl_);
  if (!impl_->requests.contains(id)) return false;
  // It has had what it wanted of an answer: a stop string, or a reader who has gone.
  if (const Sequence& sequence = impl_->requests.at(id)->sequence; sequence.num_generated() > 0)
    impl_->count_attainment(sequence);
  impl_->end_early(id, FinishReason::kCancelled);
  impl_->counters["requests_cancelled"] += 1;
  return true;
}

bool Engine::has_work() const {
  const Impl::Entry entry(*impl_);
  return impl_->scheduler.has_inference() || impl_->scheduler.has_training() || !impl_->token_events.empty() ||
         !impl_->job_events.empty();
}

void Engine::create_adapter(const std::string& name, const AdapterConfig& config, std::uint64_t seed) {
  const Impl::Entry entry(*impl_);
  impl_->adapters.create(name, config, seed);
}

void Engine::load_adapter(const std::string& name, const std::string& directory) {
  const Impl::Entry entry(*impl_);
  impl_->adapters.load(name, directory);
}

void Engine::save_adapter(const std::string& name, const std::string& directory) const {
  AdapterConfig config;
  std::vector<AdapterTensor> tensors;
  {
    const Impl::Entry entry(*impl_);
    const auto adapter = impl_->adapters.get(name);
    config = adapter->config;
    tensors = adapter_tensors(*adapter, adapter->download().data());
  }
  write_peft(directory, config, tensors);  // while others go on
}

std::vector<AdapterInfo> Engine::adapters() const {
  const Impl::Entry entry(*impl_);
  std::vector<AdapterInfo> infos;
  for (const auto& adapter : impl_->adapters.all()) {
    AdapterInfo info{.name = adapter->name,
                     .version = adapter->version,
                     .peft_type = peft_type(adapter->config),
                     .bytes = static_cast<std::int64_t>(adapter->bytes()),
                     .training = impl_->is_training(adapter->name)};
    for (const auto& module : adapter->layout.modules) {
      info.rank = std::max(info.rank, module.rank);
      const std::string leaf = module.path.substr(module.path.rfind('.') + 1);
      if (!leaf.empty() &&
          std::find(info.target_modules.begin(), info.target_modules.end(), leaf) == info.target_modules.end())
        info.target_modules.push_back(leaf);
    }
    infos.push_back(std::move(info));
  }
  return infos;
}

void Engine::unload_adapter(const std::string& name) {
  const Impl::Entry entry(*impl_);
  impl_->unload(name);
}

JobId Engine::finetune(const std::string& adapter, std::vector<Example> examples, const FinetuneConfig& config) {
  const Impl::Entry entry(*impl_);
  return impl_->start_job(adapter, std::move(examples), config);
}

std::vector<float> Engine::score(const std::vector<std::int32_t>& token_ids, const std::string& adapter) {
  const Impl::Entry entry(*impl_);
  require(!token_ids.empty(), "token_ids: empty, wanted at least one token");
  impl_->check_tokens(token_ids, "token_ids");
  const auto held = adapter.empty() ? nullptr : impl_->adapters.get(adapter);
  std::vector<float> scores(token_ids.size() - 1);
  if (!scores.empty()) impl_->forward_alone(token_ids, held.get(), scores.data(), nullptr);
  return scores;
}

std::vector<float> Engine::logits(const std::vector<std::int32_t>& token_ids, const std::string& adapter) {
  const Impl::Entry entry(*impl_);
  require(!token_ids.empty(), "token_ids: empty, wanted at least one token");
  const auto held = adapter.empty() ? nullptr : impl_->adapters.get(adapter);
  std::vector<float> logits(token_ids.size() * static_cast<std::size_t>(impl_->model.vocab_size));
  impl_->forward_alone(token_ids, held.get(), nullptr, logits.data());
  return logits;
}

LossAndGradients Engine::loss_and_gradients(const std::string& adapter, const std::vector<Example>& examples,
                                            std::int64_t window_tokens, std::int64_t backward_window_tokens,
                                            std::optional<std::uint64_t> dropout_seed) {
  const Impl::Entry entry(*impl_);
  return impl_->loss_and_gradients(adapter, examples, window_tokens, backward_window_tokens, dropout_seed);
}

std::map<std::string, std::int64_t> Engine::memory() const {
  std::map<std::string, std::int64_t> bytes;
  for (std::size_t i = 0; i < static_cast<std::size_t>(MemoryTag::kCount); ++i) {
    const auto tag = static_cast<MemoryTag>(i);
    bytes[std::string(memory_tag_name(tag))] = static_cast<std::int64_t>(impl_->ledger.current(tag));
  }
  return bytes;
}

std::map<std::string, std::int64_t> Engine::memory_peak() const {
  std::map<std::string, std::int64_t> bytes;
  for (std::size_t i = 0; i < static_cast<std::size_t>(MemoryTag::kCount); ++i) {
    const auto tag = static_cast<MemoryTag>(i);
    bytes[std::string(memory_tag_name(tag))] = static_cast<std::int64_t>(impl_->ledger.peak(tag));
  }
  return bytes;
}

std::map<std::string, double> Engine::stats() const {
  const Impl::Entry entry(*impl_);
  const Impl& impl = *impl_;
  auto stats = impl.counters;
  stats["requests_waiting"] = static_cast<double>(impl.scheduler.num_waiting());
  stats["requests_running"] = static_cast<double>(impl.scheduler.num_running());
  stats["kv_blocks"] = static_cast<double>(impl.blocks.num_blocks());
  stats["kv_blocks_free"] = static_cast<double>(impl.blocks.num_free());
  stats["swap_blocks"] = static_cast<double>(impl.blocks.num_host_blocks());
  stats["swap_blocks_free"] = static_cast<double>(impl.blocks.num_free_host());
  stats["prefix_cache_queries"] = static_cast<double>(impl.blocks.prefix_queries());
  stats["prefix_cache_hits"] = static_cast<double>(impl.blocks.prefix_hits());
  stats["graphs_recorded"] = static_cast<double>(impl.executor->num_recorded());
  stats["graphs_replayed"] = static_cast<double>(impl.executor->num_replayed());
  stats["step_time_margin"] = impl.cost.margin();
  stats["step_time_overrun_share"] = impl.cost.overrun_share();
  stats["step_time_observed"] = static_cast<double>(impl.cost.num_observed());
  for (const auto& [name, index] : impl.slo_classes) {
    const auto& kept = impl.attainment[static_cast<std::size_t>(index)];
    const std::string prefix = str("slo.", name.empty() ? std::string(kDefaultClass) : name, ".");
    stats[prefix + "requests"] = kept.requests;
    stats[prefix + "kept_ttft"] = kept.kept_ttft;
    stats[prefix + "kept_tpot"] = kept.kept_tpot;
    stats[prefix + "kept"] = kept.kept;
  }
  for (const auto& [name, quantile] : {std::pair("p50", 0.5), std::pair("p95", 0.95), std::pair("p99", 0.99)})
    stats[str("step_time_error_", name)] = impl.cost.error_quantile(quantile);
  const auto coefficients = impl.cost.coefficients();
  const auto names = CostModel::term_names();
  for (std::size_t i = 0; i < names.size(); ++i) stats[str("step_time_ms.", names[i])] = coefficients[i];
  return stats;
}

ModelInfo Engine::model() const {
  const Impl& impl = *impl_;
  const auto& m = impl.model;
  return {.architecture = m.architecture_name,
          .device = impl.sizes.device.kind == DeviceKind::kCpu ? "cpu" : str("cuda:", impl.sizes.device.index),
          .dtype = impl.config.dtype,
          .quantization = impl.sizes.linears.quantized() ? *impl.config.quantization : "none",
          .quantization_group_size = impl.sizes.linears.quantized() ? impl.sizes.linears.group_size : 0,
          .num_layers = m.num_layers,
          .hidden_size = m.hidden_size,
          .intermediate_size = m.intermediate_size,
          .num_heads = m.num_heads,
          .num_kv_heads = m.num_kv_heads,
          .head_dim = m.head_dim,
          .vocab_size = m.vocab_size,
          .max_position_embeddings = m.max_position_embeddings,
          .num_parameters = impl.compiled.base().num_parameters(),
          .eos_token_ids = m.eos_token_ids,
          .num_blocks = impl.sizes.limits.num_blocks,
          .block_size = impl.sizes.limits.block_size,
          .max_model_len = impl.sizes.max_model_len,
          .num_threads = impl.threads.size()};
}

void Engine::set_slo(const SLO& slo, const std::string& slo_class) {
  const Impl::Entry entry(*impl_);
  impl_->set_slo(slo, slo_class);
}

void Engine::set_policy(const std::string& policy) {
  const Impl::Entry entry(*impl_);
  impl_->scheduler.set_policy(policy);
}

void Engine::Impl::set_slo(const SLO& slo, const std::string& name) {
  check(slo, "slo");
  require(name != kDefaultClass, "slo_class: \"", name,
          "\", wanted another name: the default objective is that of none");
  const auto index = slo_classes.try_emplace(name, static_cast<std::int64_t>(slo_classes.size())).first->second;
  scheduler.set_objective(index, slo);
  attainment.resize(slo_classes.size());
}

}  // namespace flexcore
