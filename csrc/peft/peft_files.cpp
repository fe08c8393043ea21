#include "peft/peft_files.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <map>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/json_fields.h"
#include "model/floats.h"
#include "model/safetensors.h"
#include "peft/lora_matcher.h"

namespace flexcore {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::pair<std::string_view, char> kSuffixes[] = {
    {".lora_A.weight", 'A'}, {".lora_B.weight", 'B'}, {".base_layer.weight", '\0'}};
constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kWeightsFile = "adapter_model.safetensors";

/// Options that the reader takes, and those that say nothing about the result of a finished adapter, whatever their
/// value.
constexpr std::string_view kRead[] = {"peft_type",         "r",
                                      "lora_alpha",        "lora_dropout",
                                      "target_modules",    "exclude_modules",
                                      "use_rslora",        "rank_pattern",
                                      "alpha_pattern",     "bias",
                                      "init_lora_weights", "base_model_name_or_path"};
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

void refuse_other_options(const JsonFields& fields, const Json& json) {
  for (const auto& [name, value] : json.as_object())
    if (!contains(kRead, name) && !contains(kHarmless, name) && !is_empty(value))
      fields.fail<Unsupported>(name, &value, "nothing: flexcore does not know this option");
  if (const auto type = fields.string_or("peft_type", ""); type != "LORA")
    fields.fail<Unsupported>("peft_type", fields.find("peft_type"), "\"LORA\"");
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

void read_targets(const JsonFields& fields, LoraConfig& config) {
  const Json* targets = fields.find("target_modules");
  config.target_modules.clear();
  if (targets == nullptr) return;
  if (targets->is_string()) {
    std::string lower = targets->as_string();
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    config.target_modules_is_regex = lower != "all-linear";
    config.target_modules = {config.target_modules_is_regex ? targets->as_string() : lower};
    return;
  }
  if (!targets->is_array()) fields.fail("target_modules", targets, "a list of names or a string");
  for (const auto& name : targets->as_array()) {
    if (!name.is_string()) fields.fail("target_modules", targets, "a list of names or a string");
    config.target_modules.push_back(name.as_string());
  }
}

template <class Value, class Read>
std::vector<std::pair<std::string, Value>> read_patterns(const JsonFields& fields, const char* name, Read&& read) {
  std::vector<std::pair<std::string, Value>> result;
  const Json* patterns = fields.find(name);
  if (patterns == nullptr) return result;
  const JsonFields values(*patterns, str(fields.source(), ": ", name));
  for (const auto& member : patterns->as_object()) result.emplace_back(member.first, read(values, member.first));
  return result;
}

PeftAdapter read_config(const std::string& path) {
  const Json json = load_json(path);
  const JsonFields fields(json, path);
  refuse_other_options(fields, json);
  PeftAdapter adapter;
  LoraConfig& config = adapter.config;
  config.r = fields.find("r") == nullptr ? 8 : fields.integer("r", 1);
  config.lora_alpha = fields.number_or("lora_alpha", 8.0);
  config.use_rslora = fields.boolean_or("use_rslora", false);
  config.rank_pattern = read_patterns<std::int64_t>(
      fields, "rank_pattern", [](auto& values, auto& pattern) { return values.integer(pattern, 1); });
  config.alpha_pattern = read_patterns<double>(fields, "alpha_pattern",
                                               [](auto& values, auto& pattern) { return values.number(pattern); });
  read_targets(fields, config);
  adapter.base_model = fields.string_or("base_model_name_or_path", "");
  adapter.lora_dropout = fields.number_or("lora_dropout", 0.0);
  if (adapter.lora_dropout < 0 || adapter.lora_dropout >= 1)
    fields.fail("lora_dropout", fields.find("lora_dropout"), "a number in [0, 1)");
  // Without a list, or with exceptions to it, the modules that have weights are the targets.
  const Json* exceptions = fields.find("exclude_modules");
  if (fields.find("target_modules") == nullptr || (exceptions != nullptr && !is_empty(*exceptions)))
    config.target_modules.clear();
  return adapter;
}

std::vector<float> read_matrix(const SafetensorsModel& file, const SafetensorsModel::Entry& entry) {
  const TensorView view = file.tensor(entry.name);
  require<ModelLoadError>(view.ndim() == 2, file.describe(entry), ": got ", view.describe(), ", wanted two dimensions");
  require<Unsupported>(
      view.dtype() == DType::kFloat32 || view.dtype() == DType::kBFloat16 || view.dtype() == DType::kFloat16,
      file.describe(entry), ": dtype ", entry.dtype, ", wanted F32, BF16 or F16");
  require<ModelLoadError>(all_finite(view, 0, view.size(), DType::kFloat32), file.describe(entry),
                          ": holds NaN or infinity");
  std::vector<float> values(static_cast<std::size_t>(view.size()));
  to_float32(view, values.data());
  return values;
}

/// Module path and 'A' or 'B' of a tensor's name, or 0 for PEFT's copy of the frozen weight under LoRA, which it saves
/// with lm_head. Throws for any other kind of tensor.
std::pair<std::string, char> split_name(const SafetensorsModel& file, const SafetensorsModel::Entry& entry) {
  std::string_view name = entry.name;
  if (name.starts_with(kPrefix)) {
    name.remove_prefix(kPrefix.size());
    for (const auto& [suffix, factor] : kSuffixes)
      if (name.ends_with(suffix)) return {std::string(name.substr(0, name.size() - suffix.size())), factor};
  }
  throw Unsupported(str(file.describe(entry), ": wanted ", kPrefix, "<module>.lora_A.weight or .lora_B.weight"));
}

std::vector<LoraWeights> read_weights(const std::string& path) {
  const SafetensorsModel file(path);
  std::vector<LoraWeights> modules;
  std::map<std::string, std::size_t> by_path;
  for (const auto& entry : file.entries()) {
    const auto [module, factor] = split_name(file, entry);
    const auto [at, is_new] = by_path.emplace(module, modules.size());
    if (is_new) modules.emplace_back().module = module;
    LoraWeights& weights = modules[at->second];
    if (factor == '\0') continue;
    (factor == 'A' ? weights.lora_a : weights.lora_b) = read_matrix(file, entry);
  }
  for (auto& weights : modules) {
    const auto *a = file.find(peft_tensor_name(weights.module, 'A')),
               *b = file.find(peft_tensor_name(weights.module, 'B'));
    require<ModelLoadError>(a != nullptr && b != nullptr, path, ": no tensor ",
                            peft_tensor_name(weights.module, a == nullptr ? 'A' : 'B'));
    weights.rank = a->shape[0];
    weights.in_features = a->shape[1];
    weights.out_features = b->shape[0];
    require<ModelLoadError>(b->shape[1] == weights.rank, file.describe(*b), ": rank ", b->shape[1],
                            ", wanted that of lora_A, ", weights.rank);
  }
  require<ModelLoadError>(!modules.empty(), path, ": no tensors");
  return modules;
}

void check_against_config(const PeftAdapter& adapter, const std::string& path) {
  const LoraMatcher matcher(adapter.config);
  for (const auto& weights : adapter.modules) {
    const auto lora = matcher.resolve(weights.module);
    require<ModelLoadError>(lora.has_value(), path, ": ", weights.module, " has weights, but is none of the ",
                            "target_modules in ", kConfigFile);
    require<ModelLoadError>(lora->rank == weights.rank, path, ": tensor ", peft_tensor_name(weights.module, 'A'),
                            ": rank ", weights.rank, ", wanted ", lora->rank, " as in ", kConfigFile);
  }
}

/// "all-linear" as PEFT itself saves it: by name. The last names tell the linears from the output layer.
Json target_json(const LoraConfig& config, std::span<const LoraWeights> modules) {
  if (config.target_modules_is_regex) return config.target_modules.at(0);
  std::set<std::string> names(config.target_modules.begin(), config.target_modules.end());
  if (config.target_modules == std::vector<std::string>{"all-linear"}) {
    names.clear();
    for (const auto& weights : modules) names.insert(weights.module.substr(weights.module.rfind('.') + 1));
  }
  return Json::Array(names.begin(), names.end());
}

// PEFT's type for alpha is int.
Json alpha_json(double alpha) {
  const auto whole = static_cast<std::int64_t>(std::clamp(alpha, -1e15, 1e15));
  return static_cast<double>(whole) == alpha ? Json(whole) : Json(alpha);
}

Json config_json(const LoraConfig& config, std::span<const LoraWeights> modules, const std::string& base_model) {
  Json::Object ranks, alphas;
  for (const auto& [pattern, rank] : config.rank_pattern) ranks.emplace_back(pattern, rank);
  for (const auto& [pattern, alpha] : config.alpha_pattern) alphas.emplace_back(pattern, alpha_json(alpha));
  return Json::Object{
      {"alpha_pattern", std::move(alphas)},
      {"auto_mapping", nullptr},
      {"base_model_name_or_path", base_model.empty() ? Json() : Json(base_model)},
      {"bias", "none"},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"layers_pattern", nullptr},
      {"layers_to_transform", nullptr},
      {"lora_alpha", alpha_json(config.lora_alpha)},
      {"lora_dropout", 0.0},
      {"modules_to_save", nullptr},
      {"peft_type", "LORA"},
      {"r", config.r},
      {"rank_pattern", std::move(ranks)},
      {"revision", nullptr},
      {"target_modules", target_json(config, modules)},
      {"task_type", "CAUSAL_LM"},
      {"use_dora", false},
      {"use_rslora", config.use_rslora},
  };
}

}  // namespace

std::string peft_tensor_name(std::string_view module, char factor) {
  return str(kPrefix, module, ".lora_", factor, ".weight");
}

PeftAdapter read_peft(const std::string& directory) {
  const fs::path folder(directory);
  const auto path = (folder / kWeightsFile).string();
  PeftAdapter adapter = read_config((folder / kConfigFile).string());
  std::error_code ignored;
  require<Unsupported>(fs::exists(path, ignored) || !fs::exists(folder / "adapter_model.bin", ignored), directory,
                       ": weights in adapter_model.bin, wanted ", kWeightsFile,
                       " (load it with PEFT and save it with safe_serialization=True)");
  adapter.modules = read_weights(path);
  LoraConfig& config = adapter.config;
  if (config.target_modules.empty()) {
    config.target_modules_is_regex = false;
    for (const auto& weights : adapter.modules) config.target_modules.push_back(weights.module);
  }
  check_against_config(adapter, path);
  return adapter;
}

void write_peft(AtomicDirectory& output, const LoraConfig& config, std::span<const LoraWeights> modules,
                const std::string& base_model) {
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const auto& weights : modules) {
    const auto add = [&](char factor, const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
      const auto name = peft_tensor_name(weights.module, factor);
      require(static_cast<std::int64_t>(values.size()) == rows * columns, name, ": ", values.size(),
              " values, wanted [", rows, ", ", columns, "]");
      tensors.emplace_back(name, TensorView(const_cast<float*>(values.data()), DType::kFloat32, {rows, columns}));
    };
    add('A', weights.lora_a, weights.rank, weights.in_features);
    add('B', weights.lora_b, weights.out_features, weights.rank);
  }
  write_file(output.file(kConfigFile), config_json(config, modules, base_model).dump(2) + "\n");
  write_safetensors(output.file(kWeightsFile), tensors);
}

void write_peft(const std::string& directory, const LoraConfig& config, std::span<const LoraWeights> modules,
                const std::string& base_model) {
  AtomicDirectory output(directory);
  write_peft(output, config, modules, base_model);
  output.commit();
}

}  // namespace flexcore
