#include "peft/peft_files.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/json_fields.h"
#include "model/floats.h"
#include "model/safetensors.h"
#include "peft/lora_matcher.h"
#include "peft/module_matcher.h"

namespace flexcore {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "base_model.model.";
constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";

/// What the files of one method hold.
struct Format {
  std::string_view type;                   // peft_type
  std::vector<std::string_view> suffixes;  // of tensors: every module has all of them, if it has one
  std::vector<std::string_view> optional;  // those of some adapters
  std::vector<std::string_view> options;   // that its reader takes
};
/// The one tensor of prompt and prefix tuning, which belongs to no module.
constexpr std::string_view kVirtualTokens = "prompt_embeddings";
const Format kFormats[] = {
    {"LORA",
     {".lora_A.weight", ".lora_B.weight"},
     {".lora_magnitude_vector"},
     {"modules_to_save", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
      "bias", "init_lora_weights"}},
    {"IA3", {".ia3_l"}, {}, {"feedforward_modules", "init_ia3_weights"}},
    {"BOTTLENECK",
     {".adapter_down.weight", ".adapter_up.weight"},
     {},
     {"bottleneck_size", "non_linearity", "scaling", "use_parallel_adapter", "bias", "init_weights"}},
    {"PROMPT_TUNING",
     {kVirtualTokens},
     {},
     {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
      "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}},
    {"PREFIX_TUNING",
     {kVirtualTokens},
     {},
     {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
      "encoder_hidden_size", "prefix_projection", "init_weights"}},
};
/// PEFT's copy of a frozen weight under an adapter, which it saves with lm_head and embed_tokens.
constexpr std::string_view kFrozen = ".base_layer.weight";
/// LoRA of an embedding: both or none.
constexpr std::string_view kEmbedding[] = {".lora_embedding_A", ".lora_embedding_B"};
/// Of a module that is there whole (modules_to_save).
constexpr std::string_view kWhole = ".weight";

/// Options that all readers take, and those that say nothing about the result of a finished adapter, whatever their
/// value.
constexpr std::string_view kRead[] = {"peft_type", "target_modules", "exclude_modules", "base_model_name_or_path"};
constexpr std::string_view kHarmless[] = {"task_type",        "revision",       "inference_mode", "auto_mapping",
                                          "peft_version",     "runtime_config", "megatron_core",  "layers_pattern",
                                          "loftq_config",     "eva_config",     "corda_config",   "lora_ga_config",
                                          "qalora_group_size"};
/// Ways to begin that change the base model's weights too: on the original weights the adapter would be wrong.
constexpr std::string_view kInitsThatChangeTheBase[] = {"pissa", "olora", "corda", "loftq", "lora_ga"};

template <class Range, class Value>
bool contains(const Range& range, const Value& value) {
  return std::find(std::begin(range), std::end(range), value) != std::end(range);
}

bool is_empty(const Json& value) {
  return value.is_null() || value == Json(false) || (value.is_number() && value.as_double() == 0) ||
         value == Json("") || (value.is_array() && value.as_array().empty()) ||
         (value.is_object() && value.as_object().empty());
}

const Format& format_of(const JsonFields& fields) {
  const std::string type = fields.string_or("peft_type", "");
  for (const auto& format : kFormats)
    if (format.type == type) return format;
  fields.fail<Unsupported>("peft_type", fields.find("peft_type"),
                           "\"LORA\", \"IA3\", \"BOTTLENECK\", \"PROMPT_TUNING\" or \"PREFIX_TUNING\"");
}

void refuse_other_options(const JsonFields& fields, const Json& json, const Format& format) {
  for (const auto& [name, value] : json.as_object())
    if (!contains(kRead, name) && !contains(kHarmless, name) && !contains(format.options, name) && !is_empty(value))
      fields.fail<Unsupported>(name, &value, "nothing: flexcore does not know this option");
  if (fields.string_or("bias", "none") != "none") fields.fail<Unsupported>("bias", fields.find("bias"), "\"none\"");
  const Json* init = fields.find("init_lora_weights");
  if (init == nullptr || !init->is_string()) return;
  std::string method = init->as_string();
  std::transform(method.begin(), method.end(), method.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const auto name : kInitsThatChangeTheBase)
    if (method.starts_with(name))
      fields.fail<Unsupported>(
          "init_lora_weights", init,
          "an adapter for the unchanged base model (PEFT: path_initial_model_for_weight_conversion)");
}

AdapterConfig read_method(const JsonFields& fields, const Format& format) {
  if (format.type == "IA3") return ia3_from_peft(fields);
  if (format.type == "BOTTLENECK") return bottleneck_from_peft(fields);
  if (format.type == "PROMPT_TUNING") return prompt_tuning_from_peft(fields);
  if (format.type == "PREFIX_TUNING") return prefix_tuning_from_peft(fields);
  return lora_from_peft(fields);
}

std::vector<float> read_values(const SafetensorsModel& file, const SafetensorsModel::Entry& entry, int ndim) {
  const TensorView view = file.tensor(entry.name);
  require<ModelLoadError>(view.ndim() == ndim, file.describe(entry), ": got ", view.describe(), ", wanted ",
                          ndim == 1 ? "one dimension" : "two dimensions");
  require<Unsupported>(
      view.dtype() == DType::kFloat32 || view.dtype() == DType::kBFloat16 || view.dtype() == DType::kFloat16,
      file.describe(entry), ": dtype ", entry.dtype, ", wanted F32, BF16 or F16");
  require<ModelLoadError>(all_finite(view, 0, view.size(), DType::kFloat32), file.describe(entry),
                          ": holds NaN or infinity");
  std::vector<float> values(static_cast<std::size_t>(view.size()));
  to_float32(view, values.data());
  return values;
}

/// Suffixes that an adapter's tensors may have, the longer ones first.
std::vector<std::string_view> suffixes_of(const Format& format, const AdapterConfig& config) {
  std::vector<std::string_view> suffixes = format.suffixes;
  if (const auto* lora = std::get_if<LoraConfig>(&config)) {
    suffixes.insert(suffixes.end(), std::begin(kEmbedding), std::end(kEmbedding));
    if (lora->use_dora) suffixes.insert(suffixes.end(), format.optional.begin(), format.optional.end());
    suffixes.push_back(kFrozen);
    if (!lora->modules_to_save.empty()) suffixes.push_back(kWhole);
    return suffixes;
  }
  suffixes.push_back(kFrozen);
  return suffixes;
}

/// Module path and suffix of a tensor's name. Throws for any kind of tensor that is none of the format's.
std::pair<std::string, std::string_view> split_name(const SafetensorsModel& file, const SafetensorsModel::Entry& entry,
                                                    const Format& format,
                                                    const std::vector<std::string_view>& suffixes) {
  std::string_view name = entry.name;
  if (format.suffixes[0] == kVirtualTokens) {
    if (name == kVirtualTokens) return {"", kVirtualTokens};
    throw Unsupported(str(file.describe(entry), ": wanted ", kVirtualTokens));
  }
  if (name.starts_with(kPrefix)) {
    name.remove_prefix(kPrefix.size());
    for (const auto suffix : suffixes)
      if (name.ends_with(suffix)) return {std::string(name.substr(0, name.size() - suffix.size())), suffix};
  }
  std::string wanted;
  for (const auto suffix : suffixes)
    if (suffix != kFrozen) wanted += str(wanted.empty() ? "" : " or ", suffix);
  throw Unsupported(str(file.describe(entry), ": wanted ", kPrefix, "<module>", wanted));
}

void read_tensors(PeftAdapter& adapter, const std::string& path, const Format& format) {
  const SafetensorsModel file(path);
  const auto suffixes = suffixes_of(format, adapter.config);
  std::vector<std::string> modules;
  for (const auto& entry : file.entries()) {
    auto [module, suffix] = split_name(file, entry, format, suffixes);
    if (std::find(modules.begin(), modules.end(), module) == modules.end()) modules.push_back(module);
    if (suffix == kFrozen) continue;
    AdapterTensor& tensor = adapter.tensors.emplace_back();
    tensor.array = {module, std::string(suffix), entry.shape};
    tensor.values = read_values(file, entry, contains(format.optional, suffix) ? 1 : 2);
  }
  require<ModelLoadError>(!modules.empty(), path, ": no tensors");
  const auto has = [&](const std::string& module, std::string_view suffix) {
    return adapter.find(module, std::string(suffix)) != nullptr;
  };
  const auto has_any = [&](const std::string& module, const auto& of) {
    return std::any_of(std::begin(of), std::end(of), [&](auto suffix) { return has(module, suffix); });
  };
  for (const auto& module : modules) {
    const bool whole = has(module, kWhole), embedding = has_any(module, kEmbedding),
               bypass = has_any(module, format.suffixes) || has_any(module, format.optional);
    require<ModelLoadError>(
        whole + embedding + bypass <= 1, path, ": ", module,
        " has tensors of two kinds, wanted those of a whole module, of an embedding or of a linear");
    if (whole) continue;
    const std::span<const std::string_view> needed =
        embedding ? std::span<const std::string_view>(kEmbedding) : std::span(format.suffixes);
    for (const auto suffix : needed)
      require<ModelLoadError>(has(module, suffix), path, ": no tensor ",
                              peft_key({module, std::string(suffix), {}, 0}));
  }
}

// Of LoRA: B's rank is A's, and what the config says.
void check_ranks(const PeftAdapter& adapter, const LoraConfig& config, const std::string& path) {
  const LoraMatcher matcher(config);
  const SafetensorsModel file(path);
  for (const auto& [array, values] : adapter.tensors) {
    if (array.suffix == kWhole) {
      require<ModelLoadError>(
          std::any_of(config.modules_to_save.begin(), config.modules_to_save.end(),
                      [&, module = std::string_view(array.module)](auto& name) { return is_suffix(module, name); }),
          path, ": ", array.module, " is there whole, but is none of the modules_to_save in ", kConfigFile);
      continue;
    }
    const auto lora = matcher.resolve(array.module);
    require<ModelLoadError>(lora.has_value(), path, ": ", array.module, " has weights, but is none of the ",
                            "target_modules in ", kConfigFile);
    const bool embedding = array.suffix == kEmbedding[0];
    if (array.suffix != ".lora_A.weight" && !embedding) continue;
    const std::int64_t rank = array.shape[0];
    const auto& b = adapter.find(array.module, embedding ? std::string(kEmbedding[1]) : ".lora_B.weight")->array;
    require<ModelLoadError>(b.shape[1] == rank, file.describe(*file.find(peft_key(b))), ": rank ", b.shape[1],
                            ", wanted that of lora_A, ", rank);
    require<ModelLoadError>(lora->rank == rank, path, ": tensor ", peft_key(array), ": rank ", rank, ", wanted ",
                            lora->rank, " as in ", kConfigFile);
  }
}

/// "all-linear" as PEFT itself saves it: by name. The last names tell the linears from the output layer.
Json target_json(const std::vector<std::string>& targets, bool is_regex, std::span<const AdapterTensor> tensors) {
  if (is_regex) return targets.at(0);
  std::set<std::string> names(targets.begin(), targets.end());
  if (targets == std::vector<std::string>{"all-linear"}) {
    names.clear();
    for (const auto& [array, values] : tensors)
      if (array.suffix != kWhole) names.insert(array.module.substr(array.module.rfind('.') + 1));
  }
  return Json::Array(names.begin(), names.end());
}

Json config_json(const AdapterConfig& config, std::span<const AdapterTensor> tensors, const std::string& base_model) {
  return std::visit(
      [&](const auto& method) {
        Json::Object json = to_peft(method);
        json.emplace_back("auto_mapping", nullptr);
        json.emplace_back("base_model_name_or_path", base_model.empty() ? Json() : Json(base_model));
        json.emplace_back("inference_mode", true);
        json.emplace_back("peft_type", peft_type(config));
        json.emplace_back("revision", nullptr);
        if constexpr (requires { method.target_modules; })
          json.emplace_back("target_modules",
                            target_json(method.target_modules, method.target_modules_is_regex, tensors));
        json.emplace_back("task_type", "CAUSAL_LM");
        std::sort(json.begin(), json.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
        return Json(std::move(json));
      },
      config);
}

}  // namespace

const AdapterTensor* PeftAdapter::find(const std::string& module, const std::string& suffix) const {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const AdapterTensor& tensor) {
    return tensor.array.module == module && tensor.array.suffix == suffix;
  });
  return found == tensors.end() ? nullptr : &*found;
}

PeftAdapter read_peft(const std::string& directory) {
  const fs::path folder(directory);
  const auto path = (folder / kWeightsFile).string();
  const auto config_path = (folder / kConfigFile).string();
  const Json json = load_json(config_path);
  const JsonFields fields(json, config_path);
  const Format& format = format_of(fields);
  refuse_other_options(fields, json, format);
  PeftAdapter adapter{.config = read_method(fields, format),
                      .base_model = fields.string_or("base_model_name_or_path", "")};
  std::error_code ignored;
  require<Unsupported>(fs::exists(path, ignored) || !fs::exists(folder / "adapter_model.bin", ignored), directory,
                       ": weights in adapter_model.bin, wanted ", kWeightsFile,
                       " (load it with PEFT and save it with safe_serialization=True)");
  auto* lora = std::get_if<LoraConfig>(&adapter.config);
  read_tensors(adapter, path, format);
  // Without a list, or with exceptions to it, the modules that have weights are the targets.
  const Json* exceptions = fields.find("exclude_modules");
  const bool listed = fields.find("target_modules") != nullptr && (exceptions == nullptr || is_empty(*exceptions));
  std::visit(
      [&](auto& method) {
        if constexpr (requires { method.target_modules; }) {
          if (listed && !method.target_modules.empty()) return;
          method.target_modules_is_regex = false;
          std::set<std::string> modules;
          for (const auto& [array, values] : adapter.tensors)
            if (array.suffix != kWhole) modules.insert(array.module);
          method.target_modules.assign(modules.begin(), modules.end());
        }
      },
      adapter.config);
  if (lora != nullptr) check_ranks(adapter, *lora, path);
  return adapter;
}

void write_peft(AtomicDirectory& output, const AdapterConfig& config, std::span<const AdapterTensor> tensors,
                const std::string& base_model) {
  std::vector<std::pair<std::string, TensorView>> views;
  for (const auto& [array, values] : tensors) {
    const auto name = peft_key(array);
    require(static_cast<std::int64_t>(values.size()) == array.size(), name, ": ", values.size(), " values, wanted ",
            array.size());
    TensorView view(const_cast<float*>(values.data()), DType::kFloat32, {array.size()});
    if (array.shape.size() == 2) view = view.reshape({array.shape[0], array.shape[1]});
    views.emplace_back(name, view);
  }
  write_file(output.file(kConfigFile), config_json(config, tensors, base_model).dump(2) + "\n");
  write_safetensors(output.file(kWeightsFile), views);
}

void write_peft(const std::string& directory, const AdapterConfig& config, std::span<const AdapterTensor> tensors,
                const std::string& base_model) {
  AtomicDirectory output(directory);
  write_peft(output, config, tensors, base_model);
  output.commit();
}

}  // namespace flexcore
