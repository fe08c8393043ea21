#include <algorithm>
#include <cstdlib>
#include <limits>

#include "core/check.h"
#include "engine/impl.h"
#include "model/archs/archs.h"
#include "peft/lora_matcher.h"
#include "sched/search.h"

namespace flexcore {

namespace {

// Positions, rows and pages are numbered by 32 bits; products of two such sizes and a page's bytes fit 64.
constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxBlockSize = 1 << 16;

std::optional<KeepMode> keep_mode(const EngineConfig& config) {
  for (const auto& [name, mode] : {std::pair("exact", KeepMode::kLeast),
                                   {"int8", KeepMode::kCodes},
                                   {"all", KeepMode::kAll},
                                   {"read", KeepMode::kRead}})
    if (config.finetune_activations == name) return mode;
  return {};
}

/// Asks the device's ops for sizes, without the device.
template <class Ask>
std::int64_t ask_sizes(const EngineSizes& sizes, Ask&& ask) {
  MemoryLedger ledger;
  Arena scratch(host_allocator(), ledger);
  ThreadPool threads(1);
  const OpRegistry registry = make_op_registry();
  OpContext context{&registry, sizes.device, &threads, &scratch, nullptr};
  return static_cast<std::int64_t>(ask(context));
}

// What a training sequence of that length may keep: of the pool, what its own keys and values leave.
std::int64_t budget_of(const EngineConfig& config, const EngineSizes& sizes, std::int64_t length) {
  constexpr std::int64_t kAlignment = 64;  // between what it saves and its gradients
  const std::int64_t pages = (length + config.block_size - 1) / config.block_size;
  const std::int64_t pool =
      std::max<std::int64_t>(0, (sizes.limits.num_blocks - pages) * sizes.block_bytes - kAlignment);
  return std::min(config.finetune_memory_bytes.value_or(pool), pool);
}

std::int64_t blocks_of(std::size_t bytes, const EngineSizes& sizes) {
  return (static_cast<std::int64_t>(bytes) + sizes.block_bytes - 1) / sizes.block_bytes;
}

bool fits_host(const CompiledModel::Candidate& candidate, const EngineSizes& sizes, std::int64_t length) {
  return blocks_of(candidate.bytes_per_token.host * static_cast<std::size_t>(length), sizes) <=
         sizes.limits.num_host_blocks;
}

WeightFormat weight_format(const EngineConfig& c) {
  require(c.quantization_group_size >= kGroupMultiple && c.quantization_group_size <= kMostGroupSize &&
              c.quantization_group_size % kGroupMultiple == 0,
          "quantization_group_size: ", c.quantization_group_size, ", wanted a multiple of ", kGroupMultiple, " up to ",
          kMostGroupSize);
  if (!c.quantization || *c.quantization == "none") return {};
  using enum WeightFormat::Kind;
  for (const auto& [name, kind] : {std::pair("int8", kInt8), std::pair("int4", kInt4), std::pair("nf4", kNf4)})
    if (*c.quantization == name) return {kind, c.quantization_group_size};
  throw InvalidArgument(str("quantization: \"", *c.quantization, "\", wanted \"none\", \"int8\", \"int4\" or \"nf4\""));
}

}  // namespace

void check(const SLO& slo, const std::string& name) {
  require(slo.tpot_ms > 0 && slo.ttft_ms > 0, name, ": tpot_ms ", slo.tpot_ms, ", ttft_ms ", slo.ttft_ms,
          ", wanted > 0");
  require(slo.attainment > 0 && slo.attainment < 1, name, ": attainment ", slo.attainment, ", wanted between 0 and 1");
}

void check(const EngineConfig& c) {
  const auto positive = [](std::int64_t value, const char* name) {
    require(value >= 1, name, ": ", value, ", wanted >= 1");
  };
  const auto within = [](std::int64_t value, std::int64_t most, const char* name) {
    require(value >= 1 && value <= most, name, ": ", value, ", wanted 1 to ", most);
  };
  within(c.max_model_len, kMaxCount, "max_model_len");
  within(c.max_num_seqs, kMaxCount, "max_num_seqs");
  within(c.max_num_batched_tokens, kMaxCount, "max_num_batched_tokens");
  within(c.block_size, kMaxBlockSize, "block_size");
  require(keep_mode(c).has_value(), "finetune_activations: \"", c.finetune_activations,
          "\", wanted \"exact\" or \"int8\", or, to compare with, \"all\" or \"read\"");
  require(!c.finetune_memory_bytes || *keep_mode(c) != KeepMode::kAll,
          "finetune_memory_bytes: ", c.finetune_memory_bytes.value_or(0),
          ", wanted none with finetune_activations \"all\", which leaves nothing out");
  require(c.dtype == "bfloat16" || c.dtype == "float32", "dtype: \"", c.dtype,
          "\", wanted \"bfloat16\" or \"float32\"");
  require(c.num_threads >= 0, "num_threads: ", c.num_threads, ", wanted >= 0");
  check(c.slo, "slo");
  for (const auto& [name, slo] : c.slo_classes) {
    require(!name.empty() && name != kDefaultClass, "slo_classes: \"", name,
            "\", wanted another name: the default objective is slo");
    check(slo, str("slo_classes[\"", name, "\"]"));
  }
  require(c.min_finetune_share >= 0 && c.min_finetune_share <= 1, "min_finetune_share: ", c.min_finetune_share,
          ", wanted 0 to 1");
  make_policy(c.policy);
  if (c.kv_cache_memory_bytes) positive(*c.kv_cache_memory_bytes, "kv_cache_memory_bytes");
  require(c.swap_space_bytes.value_or(0) >= 0, "swap_space_bytes: ", c.swap_space_bytes.value_or(0), ", wanted >= 0");
  if (c.finetune_memory_bytes) positive(*c.finetune_memory_bytes, "finetune_memory_bytes");
  weight_format(c);
  parse_device(c.device);
}

std::vector<WeightSpec> weight_specs(const Graph& graph) {
  std::vector<WeightSpec> specs;
  for (const auto& param : graph.params)
    specs.push_back({param.name, param.out_features, param.in_features, param.quantizable});
  return specs;
}

Device parse_device(const std::string& name) {
  if (name == "auto") {
    if (const char* chosen = std::getenv("FLEXCORE_DEVICE"); chosen != nullptr && std::string_view(chosen) != "auto")
      return parse_device(chosen);
    return {num_cuda_devices() > 0 ? DeviceKind::kCuda : DeviceKind::kCpu, 0};
  }
  if (name == "cpu") return {};
  if (name == "cuda") return {DeviceKind::kCuda, 0};
  const bool numbered = name.size() > 5 && name.size() <= 8 && name.rfind("cuda:", 0) == 0 &&
                        name.find_first_not_of("0123456789", 5) == std::string::npos;
  require(numbered, "device: \"", name, "\", wanted \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"");
  return {DeviceKind::kCuda, std::stoi(name.substr(5))};
}

EngineSizes engine_sizes(const ModelConfig& model, const EngineConfig& config) {
  check(config);
  EngineSizes sizes;
  sizes.device = parse_device(config.device);
  sizes.compute = config.dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
  sizes.linears = weight_format(config);
  sizes.max_model_len = std::min(config.max_model_len, model.max_position_embeddings);
  const double page = 2.0 * static_cast<double>(model.num_layers) * static_cast<double>(model.num_kv_heads) *
                      static_cast<double>(model.head_dim) * static_cast<double>(config.block_size) *
                      static_cast<double>(dtype_size(sizes.compute));
  require(page <= static_cast<double>(kMaxCount), "block_size: ", config.block_size, " tokens are a page of ", page,
          " bytes, wanted at most ", kMaxCount);
  sizes.block_bytes = static_cast<std::int64_t>(page);
  const std::int64_t blocks_per_sequence = (sizes.max_model_len + config.block_size - 1) / config.block_size;
  std::int64_t num_blocks = config.max_num_seqs * blocks_per_sequence;
  if (config.kv_cache_memory_bytes) {
    num_blocks = *config.kv_cache_memory_bytes / sizes.block_bytes;
    require(num_blocks >= 1, "kv_cache_memory_bytes: ", *config.kv_cache_memory_bytes, ", wanted at least one page of ",
            sizes.block_bytes, " bytes");
    require(num_blocks <= kMaxCount, "kv_cache_memory_bytes: ", *config.kv_cache_memory_bytes, " is ", num_blocks,
            " pages, wanted at most ", kMaxCount);
  } else {
    num_blocks =
        std::max(std::min(num_blocks, memory_bytes(sizes.device) / 4 / sizes.block_bytes), blocks_per_sequence);
  }
  // Every running sequence may need a row in one step.
  const std::int64_t max_seqs = std::min(config.max_num_seqs, config.max_num_batched_tokens);
  sizes.limits = {config.max_num_batched_tokens, max_seqs, sizes.max_model_len, num_blocks, config.block_size};
  return sizes;
}

Graph base_graph(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes) {
  Graph graph = build_model(model, sizes.compute);
  graph.keep_mode = *keep_mode(config);
  return graph;
}

std::int64_t finetune_bytes(const ModelConfig& model, const TrainingProgram& program, std::int64_t length) {
  return static_cast<std::int64_t>(
      TrainState::saved_bytes(program, length).device +
      TrainState::gradient_bytes({model.hidden_size, model.num_kv_heads * model.head_dim}, length));
}

void size_pool(const ModelConfig& model, const EngineConfig& config, CompiledModel& compiled, EngineSizes& sizes) {
  constexpr double kUsed = 0.9;  // of memory, by default
  constexpr std::int64_t kMostSwapSpace = std::int64_t{4} << 30;
  constexpr std::int64_t kShareOfHost = 8;
  std::int64_t& blocks = sizes.limits.num_blocks;
  std::int64_t of_training = blocks;
  if (!config.kv_cache_memory_bytes) {
    const std::int64_t memory = memory_bytes(sizes.device);
    const std::int64_t tokens = std::max(SchedulerConfig{}.max_finetune_tokens_in_flight, sizes.max_model_len);
    const TrainingProgram& program = compiled.training(compiled.lora_everywhere());
    const std::int64_t training =
        config.finetune_memory_bytes.value_or(std::min(finetune_bytes(model, program, tokens), memory / 2));
    // Runs and pages are whole blocks.
    of_training = training / sizes.block_bytes + 2 * std::max<std::int64_t>(1, sizes.limits.max_sampled_rows / 2);
    blocks += of_training;
    const std::int64_t rest = static_cast<std::int64_t>(kUsed * static_cast<double>(memory)) -
                              weight_bytes(compiled, sizes) - workspace_bytes(model, config, sizes, compiled);
    const std::int64_t one_sequence = (sizes.max_model_len + config.block_size - 1) / config.block_size;
    // Where not even the rest fits, loading says so.
    if (rest > 0) blocks = std::min(blocks, std::max(rest / sizes.block_bytes, one_sequence));
    blocks = std::min(blocks, kMaxCount);
  }
  const bool none = sizes.device.kind == DeviceKind::kCpu || !make_policy(config.policy)->trains();
  const std::int64_t swap_space = config.swap_space_bytes.value_or(
      none ? 0
           : std::min(
                 {kMostSwapSpace, std::min(blocks, of_training) * sizes.block_bytes, memory_bytes({}) / kShareOfHost}));
  sizes.limits.num_host_blocks = std::min(swap_space / sizes.block_bytes, kMaxCount - blocks);
}

std::int64_t weight_bytes(const CompiledModel& compiled, const EngineSizes& sizes) {
  return ask_sizes(sizes, [&](OpContext& context) {
    return WeightStore::planned_bytes(context, weight_specs(compiled.base()), sizes.compute, sizes.linears);
  });
}

std::int64_t adapter_bytes(const AdapterLayout& layout, const EngineSizes& sizes) {
  const std::int64_t own =
      ask_sizes(sizes, [&](OpContext& context) { return own_module_bytes(context, layout, sizes.compute); });
  return own + (layout.num_parameters + layout.num_derived) * static_cast<std::int64_t>(sizeof(float));
}

std::int64_t programs_bytes(CompiledModel& compiled, const TrainingProgram& program, const EngineSizes& sizes) {
  const bool two_lanes = sizes.device.kind != DeviceKind::kCpu;
  return static_cast<std::int64_t>(Executor::workspace_bytes(compiled, program, sizes.limits.max_rows, two_lanes));
}

std::int64_t workspace_bytes(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                             CompiledModel& compiled) {
  const std::int64_t rotary = sizes.limits.max_positions * model.head_dim * static_cast<std::int64_t>(sizeof(float));
  const bool two_lanes = sizes.device.kind != DeviceKind::kCpu;
  const ScratchBytes scratch = scratch_bytes(model, config, sizes);
  const std::int64_t recorded =
      two_lanes && !config.enforce_eager ? static_cast<std::int64_t>(Executor::kMostRecordedBytes) : 0;
  return rotary + static_cast<std::int64_t>((two_lanes ? 2 : 1) * Lane::indices_bytes(sizes.limits)) +
         static_cast<std::int64_t>(Executor::losses_bytes(sizes.limits)) + scratch.forward + scratch.backward +
         recorded + programs_bytes(compiled, compiled.training(compiled.lora_everywhere()), sizes);
}

StoreBlocks store_blocks(const ModelConfig& model, const EngineSizes& sizes, const TrainingProgram& program,
                         std::int64_t length) {
  const auto [device, host] =
      TrainState::store_bytes(program, {model.hidden_size, model.num_kv_heads * model.head_dim}, length);
  return {.device = blocks_of(device, sizes), .host = blocks_of(host, sizes)};
}

OperatorRates operator_rates(const EngineSizes& sizes) {
  // FLOP in the time of a byte: of bfloat16 products and of memory.
  constexpr double kOnCpu = 8, kOnGpu = 256;
  // And of one of a GPU's bus: 990e12 FLOP/s and 55e9 B/s of an H100 are 18,000, 312e12 and 25e9 of an A100 12,500.
  constexpr double kOnBus = 16384;
  const bool cpu = sizes.device.kind == DeviceKind::kCpu;
  return {.seconds_per_flop = 1e-12,
          .seconds_per_byte = 1e-12 * (cpu ? kOnCpu : kOnGpu),
          .seconds_per_host_byte = sizes.limits.num_host_blocks == 0 ? 0.0 : 1e-12 * (cpu ? kOnCpu : kOnBus),
          .context = static_cast<double>(sizes.max_model_len) / 2};
}

TrainingProgram* find_program(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                              CompiledModel& compiled, const BypassSet& bypasses, std::int64_t length) {
  const std::int64_t budget = budget_of(config, sizes, length);
  TrainingProgram& fastest = compiled.training(bypasses);
  if (finetune_bytes(model, fastest, length) <= budget) return &fastest;
  if (*keep_mode(config) == KeepMode::kAll) return nullptr;  // leaves nothing out
  const std::int64_t gradients = finetune_bytes(model, fastest, length) -
                                 static_cast<std::int64_t>(TrainState::saved_bytes(fastest, length).device);
  for (const auto& candidate : compiled.keep_candidates(bypasses))
    if (static_cast<std::int64_t>(candidate.bytes_per_token.device) * length + gradients <= budget &&
        fits_host(candidate, sizes, length))
      return &compiled.training(bypasses, candidate.choice);
  return nullptr;
}

std::int64_t longest_sequence(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                              CompiledModel& compiled, const BypassSet& bypasses) {
  return largest_that(sizes.max_model_len, [&](std::int64_t length) {
    return find_program(model, config, sizes, compiled, bypasses, length) != nullptr;
  });
}

TrainingProgram& fitting_program(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                                 CompiledModel& compiled, const BypassSet& bypasses, std::int64_t length,
                                 const std::string& what) {
  if (TrainingProgram* program = find_program(model, config, sizes, compiled, bypasses, length)) return *program;
  const TrainingProgram& fastest = compiled.training(bypasses);
  std::size_t least = fastest.saved_bytes_per_token.device;
  if (*keep_mode(config) != KeepMode::kAll)
    for (const auto& candidate : compiled.keep_candidates(bypasses))
      if (fits_host(candidate, sizes, length)) least = std::min(least, candidate.bytes_per_token.device);
  const std::int64_t a_token = static_cast<std::int64_t>(least) + finetune_bytes(model, fastest, 1) -
                               static_cast<std::int64_t>(fastest.saved_bytes_per_token.device);
  const std::int64_t budget = budget_of(config, sizes, length);
  const bool pool = budget < config.finetune_memory_bytes.value_or(std::numeric_limits<std::int64_t>::max());
  throw InvalidArgument(
      str(what, ": ", length, " tokens keep at least ", a_token * length, " bytes for the backward, more than ",
          pool ? "the pool (kv_cache_memory_bytes) has beside their keys and values (" : "finetune_memory_bytes (",
          budget, ")",
          sizes.limits.num_host_blocks > 0
              ? str(" with ", sizes.limits.num_host_blocks * sizes.block_bytes, " bytes of swap space")
              : "",
          "; at most ", longest_sequence(model, config, sizes, compiled, bypasses), " tokens fit"));
}

SchedulerConfig scheduler_config(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes,
                                 CompiledModel& compiled) {
  SchedulerConfig scheduler{.max_num_seqs = sizes.limits.max_sampled_rows,
                            .max_num_batched_tokens = sizes.limits.max_rows,
                            .num_layers = model.num_layers,
                            .objectives = {config.slo},
                            .policy = config.policy,
                            .min_finetune_share = config.min_finetune_share};
  for (const auto& [name, slo] : config.slo_classes) scheduler.objectives.push_back(slo);
  if (config.finetune_memory_bytes)  // LoRA at every linear keeps the most
    scheduler.max_finetune_tokens_in_flight = std::max<std::int64_t>(
        1, *config.finetune_memory_bytes / finetune_bytes(model, compiled.training(compiled.lora_everywhere()), 1));
  return scheduler;
}

ScratchBytes scratch_bytes(const ModelConfig& model, const EngineConfig& config, const EngineSizes& sizes) {
  return scratch_bytes(sizes.device, {.rows = sizes.limits.max_rows,
                                      .sampled_rows = sizes.limits.max_sampled_rows,
                                      .positions = sizes.max_model_len,
                                      .block_size = sizes.limits.block_size,
                                      .hidden_size = model.hidden_size,
                                      .intermediate_size = model.intermediate_size,
                                      .num_heads = model.num_heads,
                                      .num_kv_heads = model.num_kv_heads,
                                      .head_dim = model.head_dim,
                                      .vocab_size = model.vocab_size,
                                      .rank = LoraMatcher::kMaxRank,
                                      .num_threads = ThreadPool::size_for(config.num_threads),
                                      .quantized = sizes.linears.quantized()});
}

RowCounts row_capacity(const ExecutorLimits& limits) {
  return {limits.max_rows, limits.max_sampled_rows, limits.max_rows};
}

}  // namespace flexcore
