#include "flexcore/plan.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>

#include "backends/register.h"
#include "core/check.h"
#include "engine/impl.h"
#include "engine/parallel_plan.h"
#include "peft/attach.h"

namespace flexcore {

namespace {

std::string_view choice_name(Keep keep) {
  switch (keep) {
    case Keep::kKept:
      return "kept";
    case Keep::kOffloaded:
      return "offloaded";
    case Keep::kRebuilt:
      return "rebuilt";
    case Keep::kRecomputed:
      return "recomputed";
    case Keep::kInPages:
      return "in kv_pages";
    case Keep::kDropped:
      return "dropped";
  }
  return "unknown";
}

std::string_view choice_reason(Keep keep) {
  switch (keep) {
    case Keep::kKept:
      return "only a GEMM or attention makes it";
    case Keep::kOffloaded:
      return "kept in host memory, to fit the device's";
    case Keep::kRebuilt:
      return "made again from what is kept";
    case Keep::kRecomputed:
      return "made again, to fit finetune_memory_bytes";
    case Keep::kInPages:
      return "read from the KV pages";
    case Keep::kDropped:
      return "no backward reads it";
  }
  return "";
}

std::string bytes_text(std::int64_t bytes) {
  char text[32];
  if (bytes >= 1'000'000'000)
    std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) / 1e9);
  else if (bytes >= 1'000'000)
    std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  else
    std::snprintf(text, sizeof text, "%.1f kB", static_cast<double>(bytes) / 1e3);
  return text;
}

// One decoder layer stands for all: not the lowest, which keeps less, nor the last, whose output goes to the loss head.
void explain(MemoryPlan& plan, const TrainingProgram& program, std::int64_t num_layers) {
  const int layer = static_cast<int>(num_layers > 2 ? num_layers - 2 : num_layers - 1);
  for (const auto& choice : program.choices) {
    if (choice.layer != layer) continue;
    plan.tensors.push_back({choice.name, std::string(choice_name(choice.keep)), std::string(choice_reason(choice.keep)),
                            static_cast<std::int64_t>(choice.bytes_per_token)});
    const auto bytes = static_cast<std::int64_t>(choice.bytes_per_token);
    if (choice.keep == Keep::kKept) plan.saved_bytes_per_token_per_layer += bytes;
    plan.unpruned_bytes_per_token_per_layer += bytes;
  }
  const auto rank = [](const PlannedTensor& t) {
    const auto order = {"kept", "offloaded", "recomputed", "rebuilt", "in kv_pages"};
    return std::find(order.begin(), order.end(), t.choice) - order.begin();
  };
  std::stable_sort(plan.tensors.begin(), plan.tensors.end(),
                   [&](const PlannedTensor& a, const PlannedTensor& b) { return rank(a) < rank(b); });
}

}  // namespace

MemoryPlan plan(const std::string& path, const EngineConfig& config, const std::optional<AdapterConfig>& adapter,
                std::int64_t sequence_length, const ParallelOptions& parallel) {
  check(parallel);
  const ModelConfig model = ModelConfig::load(path);
  EngineSizes sizes = engine_sizes(model, config);
  require(sequence_length >= 1 && sequence_length <= sizes.max_model_len, "sequence_length: ", sequence_length,
          ", wanted 1 to max_model_len (", sizes.max_model_len, ")");
  CompiledModel compiled(base_graph(model, config, sizes), attach_bypasses, row_capacity(sizes.limits),
                         joins_outputs(sizes.device));
  size_pool(model, config, compiled, sizes);
  compiled.set_rates(operator_rates(sizes));
  MemoryPlan plan;
  plan.num_layers = model.num_layers;
  plan.sequence_length = sequence_length;
  plan.weights = weight_bytes(compiled, sizes);
  plan.kv_pages = sizes.block_bytes * sizes.limits.num_blocks;
  plan.swap_space = sizes.block_bytes * sizes.limits.num_host_blocks;
  plan.workspace = workspace_bytes(model, config, sizes, compiled);
  const auto add_parallel = [&](ParallelWork work) {
    if (parallel.tensor_parallel_size == 1) return;
    work.kv_pages = plan.kv_pages;
    plan.parallel = plan_parallel(model, sizes, compiled, work, parallel);
  };
  if (!adapter) {
    add_parallel({});
    return plan;
  }
  const AdapterLayout layout = lay_out(*adapter, compiled.base());
  plan.max_sequence_length = std::max<std::int64_t>(
      0, longest_sequence(model, config, sizes, compiled, layout.bypasses()) - layout.num_virtual_tokens);
  sequence_length += layout.num_virtual_tokens;
  const TrainingProgram& program =
      fitting_program(model, config, sizes, compiled, layout.bypasses(), sequence_length, "sequence_length");
  const StoreBlocks store = store_blocks(model, sizes, program, sequence_length);
  const std::int64_t pages = (sequence_length + config.block_size - 1) / config.block_size + store.device;
  plan.workspace +=
      std::max<std::int64_t>(0, programs_bytes(compiled, program, sizes) -
                                    programs_bytes(compiled, compiled.training(compiled.lora_everywhere()), sizes));
  const std::int64_t sequences =
      std::min(sizes.limits.num_blocks / pages,
               store.host == 0 ? sizes.limits.num_blocks : sizes.limits.num_host_blocks / store.host);
  const std::int64_t tokens =
      std::min(scheduler_config(model, config, sizes, compiled).finetune_tokens_in_flight(sequence_length),
               sequences * sequence_length);
  plan.tokens_in_flight = tokens;
  const std::int64_t parameter_bytes = layout.num_parameters * static_cast<std::int64_t>(sizeof(float));
  const auto [saved, offloaded] = TrainState::saved_bytes(program, tokens);
  plan.saved_activations = static_cast<std::int64_t>(saved);
  plan.offloaded_activations = static_cast<std::int64_t>(offloaded);
  plan.swap_space -= plan.offloaded_activations;
  plan.adapters = 2 * adapter_bytes(layout, sizes);
  plan.optimizer = 2 * parameter_bytes;
  plan.gradients = parameter_bytes + finetune_bytes(model, program, tokens) - plan.saved_activations;
  explain(plan, program, model.num_layers);
  add_parallel({&program, layout.modules, tokens, FinetuneConfig{}.batch_size * sequence_length});
  plan.kv_pages -= finetune_bytes(model, program, tokens);
  return plan;
}

std::string MemoryPlan::describe() const {
  std::string text;
  const auto line = [&](const char* name, std::int64_t bytes) {
    char buffer[96];
    std::snprintf(buffer, sizeof buffer, "%-18s %12s\n", name, bytes_text(bytes).c_str());
    text += buffer;
  };
  line("weights", weights);
  line("kv_pages", kv_pages);
  line("saved_activations", saved_activations);
  line("adapters", adapters);
  line("gradients", gradients);
  line("optimizer", optimizer);
  line("workspace", workspace);
  line("total", total());
  if (swap_space + offloaded_activations > 0) line("swap space (host)", swap_space);
  if (offloaded_activations > 0) line("offloaded (host)", offloaded_activations);
  if (max_sequence_length > 0) {
    char buffer[128];
    std::snprintf(buffer, sizeof buffer, "tokens in training at once %lld, of sequences of at most %lld\n",
                  static_cast<long long>(tokens_in_flight), static_cast<long long>(max_sequence_length));
    text += buffer;
  }
  if (parallel) text += flexcore::describe(*parallel);
  if (tensors.empty()) return text;
  std::int64_t in_host = 0;
  for (const auto& tensor : tensors) in_host += tensor.choice == "offloaded" ? tensor.bytes_per_token : 0;
  text += str("\none layer, bytes a token: ", saved_bytes_per_token_per_layer, " kept",
              in_host > 0 ? str(", ", in_host, " in host memory,") : "", " of ", unpruned_bytes_per_token_per_layer,
              " made\n");
  for (const auto& tensor : tensors) {
    char buffer[224];
    std::snprintf(buffer, sizeof buffer, "  %-11s %-20s %7lld  %s\n", tensor.choice.c_str(), tensor.name.c_str(),
                  static_cast<long long>(tensor.bytes_per_token), tensor.reason.c_str());
    text += buffer;
  }
  return text;
}

}  // namespace flexcore
