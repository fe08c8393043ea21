#include "engine/step_time_file.h"

#include <cstdlib>
#include <filesystem>

#include "core/check.h"
#include "core/file.h"
#include "core/json.h"

namespace flexcore {
namespace {

std::string cache_directory() {
  const auto set = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
  };
  if (const auto chosen = set("FLEXCORE_CACHE"); !chosen.empty()) return chosen;
  if (const auto cache = set("XDG_CACHE_HOME"); !cache.empty()) return cache + "/flexcore";
  if (const auto home = set("HOME"); !home.empty()) return home + "/.cache/flexcore";
  return "";
}

// FNV-1a: file names need no more.
std::uint64_t hash(std::string_view text) {
  std::uint64_t value = 14695981039346656037ull;
  for (const char c : text) value = (value ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return value;
}

}  // namespace

StepTimeFile::StepTimeFile(const ModelConfig& m, const EngineConfig& config, const std::string& device, int num_threads)
    : key_(str(FLEXCORE_VERSION, " ", m.architecture_name, " ", m.num_layers, "x", m.hidden_size, "x",
               m.intermediate_size, " ", m.num_heads, "/", m.num_kv_heads, "x", m.head_dim, " ", m.vocab_size, " ",
               config.dtype, " ", config.max_num_batched_tokens, config.enforce_eager ? " eager" : "",
               config.quantization ? str(" ", *config.quantization, "/", config.quantization_group_size) : "",
               config.finetune_activations == "exact" ? "" : " activations " + config.finetune_activations, " on ",
               device, ", ", num_threads, " threads")) {
  if (const std::string directory = cache_directory(); !directory.empty()) {
    std::ostringstream name;
    name << directory << "/step_time/" << std::hex << hash(key_) << ".json";
    path_ = name.str();
  }
}

std::optional<std::vector<double>> StepTimeFile::load() const {
  try {
    if (path_.empty() || !std::filesystem::exists(path_)) return std::nullopt;
    const Json file = Json::parse(read_file(path_));
    const Json *key = file.find("engine"), *values = file.find("step_time_ms");
    if (key == nullptr || values == nullptr || key->as_string() != key_) return std::nullopt;
    std::vector<double> coefficients;
    for (const char* name : CostModel::term_names()) {
      const Json* value = values->find(name);
      if (value == nullptr) return std::nullopt;
      coefficients.push_back(value->as_double());
    }
    return coefficients;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

void StepTimeFile::save(std::span<const double> coefficients) const noexcept {
  try {
    if (path_.empty()) return;
    std::filesystem::create_directories(std::filesystem::path(path_).parent_path());
    Json::Object values;
    const auto names = CostModel::term_names();
    for (std::size_t i = 0; i < names.size(); ++i) values.emplace_back(names[i], coefficients[i]);
    write_file(path_, Json(Json::Object{{"engine", key_}, {"step_time_ms", std::move(values)}}).dump(1) + "\n");
  } catch (const std::exception&) {
  }
}

}  // namespace flexcore
