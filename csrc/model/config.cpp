#include "model/config.h"

#include <cmath>
#include <filesystem>

#include "core/check.h"
#include "core/json_fields.h"

namespace flexcore {

namespace {

constexpr std::int64_t kMaxLayers = 65536;

struct ArchitectureEntry {
  const char* name;
  Architecture architecture;
};
constexpr ArchitectureEntry kArchitectures[] = {
    {"LlamaForCausalLM", Architecture::kLlama},
    {"MistralForCausalLM", Architecture::kMistral},
    {"Qwen2ForCausalLM", Architecture::kQwen2},
    {"Qwen3ForCausalLM", Architecture::kQwen3},
};

/// One id or a list of them.
std::vector<std::int32_t> read_token_ids(const JsonFields& fields, const char* name) {
  const Json* value = fields.find(name);
  if (value == nullptr) return {};
  const Json::Array ids = value->is_array() ? value->as_array() : Json::Array{*value};
  std::vector<std::int32_t> result;
  for (const auto& id : ids) {
    if (!id.is_int() || id.as_int() < 0 || id.as_int() > JsonFields::kMaxInteger)
      fields.fail(name, value, "token ids, each an integer >= 0");
    result.push_back(static_cast<std::int32_t>(id.as_int()));
  }
  return result;
}

void read_architecture(const JsonFields& fields, ModelConfig& config) {
  const Json* names = fields.find("architectures");
  if (names == nullptr || !names->is_array() || names->as_array().size() != 1 || !names->as_array()[0].is_string())
    fields.fail("architectures", names, "a list of one name");
  config.architecture_name = names->as_array()[0].as_string();
  std::string known;
  for (const auto& entry : kArchitectures) {
    if (config.architecture_name == entry.name) {
      config.architecture = entry.architecture;
      return;
    }
    known += str(known.empty() ? "" : ", ", entry.name);
  }
  fields.fail<Unsupported>("architectures", names, "one of " + known);
}

void read_heads(const JsonFields& fields, ModelConfig& config) {
  config.num_heads = fields.integer("num_attention_heads", 1);
  config.num_kv_heads = fields.integer_or("num_key_value_heads", config.num_heads, 1);
  if (config.num_heads % config.num_kv_heads != 0)
    fields.fail("num_key_value_heads", fields.find("num_key_value_heads"),
                str("a divisor of num_attention_heads, ", config.num_heads));
  if (fields.find("head_dim") != nullptr) {
    config.head_dim = fields.integer("head_dim", 1);
  } else if (config.architecture == Architecture::kQwen3) {
    config.head_dim = 128;
  } else {
    if (config.hidden_size % config.num_heads != 0)
      fields.fail("num_attention_heads", fields.find("num_attention_heads"),
                  str("a divisor of hidden_size, ", config.hidden_size, ", or head_dim"));
    config.head_dim = config.hidden_size / config.num_heads;
  }
  require<Unsupported>(config.head_dim % 8 == 0, fields.source(), ": head_dim: got ", config.head_dim,
                       ", wanted a multiple of 8");
}

double yarn_attention_factor(const JsonFields& rope, double factor) {
  if (rope.find("attention_factor") != nullptr) return rope.positive("attention_factor");
  const auto scale = [&](double weight) { return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0; };
  const double mscale = rope.number_or("mscale", 0.0), all_dim = rope.number_or("mscale_all_dim", 0.0);
  return mscale != 0 && all_dim != 0 ? scale(mscale) / scale(all_dim) : scale(1.0);
}

// Old files have rope_theta and rope_scaling, those of transformers 5 one rope_parameters; when both are there, the old
// win.
RopeConfig read_rope(const JsonFields& fields, const ModelConfig& config) {
  const Json none(Json::Object{});
  const char* name = "rope_scaling";
  const Json* json = fields.find(name);
  if (json == nullptr || *json == none) json = fields.find(name = "rope_parameters");
  const JsonFields rope(json == nullptr ? none : *json, str(fields.source(), ": ", name));
  if (json != nullptr)
    for (const auto& [key, value] : json->as_object())
      if (value.is_object()) rope.fail<Unsupported>(key, &value, "the same rotary embedding in all layers");

  RopeConfig result;
  result.theta = rope.positive_or("rope_theta", fields.positive_or("rope_theta", result.theta));
  const JsonFields& partial = rope.find("partial_rotary_factor") != nullptr ? rope : fields;
  if (partial.positive_or("partial_rotary_factor", 1.0) != 1.0)
    partial.fail<Unsupported>("partial_rotary_factor", partial.find("partial_rotary_factor"), "1");

  const std::string type = rope.string_or("rope_type", rope.string_or("type", "default"));
  const JsonFields& original = fields.find("original_max_position_embeddings") != nullptr ? fields : rope;
  result.original_max_position_embeddings =
      original.integer_or("original_max_position_embeddings", config.max_position_embeddings, 1);
  if (type == "default") {
    result.type = RopeConfig::Type::kDefault;
  } else if (type == "linear") {
    result.type = RopeConfig::Type::kLinear;
    result.factor = rope.positive("factor");
  } else if (type == "llama3") {
    result.type = RopeConfig::Type::kLlama3;
    result.factor = rope.positive("factor");
    result.low_freq_factor = rope.positive("low_freq_factor");
    result.high_freq_factor = rope.positive("high_freq_factor");
    if (result.high_freq_factor <= result.low_freq_factor)
      rope.fail("high_freq_factor", rope.find("high_freq_factor"),
                str("above low_freq_factor, ", result.low_freq_factor));
  } else if (type == "yarn") {
    result.type = RopeConfig::Type::kYarn;
    result.factor = rope.positive_or("factor", static_cast<double>(config.max_position_embeddings) /
                                                   static_cast<double>(result.original_max_position_embeddings));
    result.beta_fast = rope.positive_or("beta_fast", result.beta_fast);
    result.beta_slow = rope.positive_or("beta_slow", result.beta_slow);
    result.truncate = rope.boolean_or("truncate", true);
    result.attention_factor = yarn_attention_factor(rope, result.factor);
    if (result.theta <= 1)
      throw ModelLoadError(str(rope.source(), ": rope_theta: got ", result.theta, ", wanted above 1"));
  } else {
    rope.fail<Unsupported>("rope_type", rope.find(rope.find("rope_type") != nullptr ? "rope_type" : "type"),
                           "one of default, linear, llama3, yarn");
  }
  return result;
}

/// Qwen2, Qwen3: layers from max_window_layers on slide, unless layer_types says which do.
std::vector<std::int64_t> read_qwen_windows(const JsonFields& fields, const Json& json, std::int64_t num_layers) {
  const Json* given = json.find("sliding_window");
  const bool slides = fields.boolean_or("use_sliding_window", false) && (given == nullptr || !given->is_null());
  // Absent is 4,096 in transformers, null is none.
  const std::int64_t window = slides ? fields.integer_or("sliding_window", 4096, 1) : 0;
  std::vector<std::int64_t> windows(static_cast<std::size_t>(num_layers), 0);
  const Json* types = fields.find("layer_types");
  if (types == nullptr) {
    const std::int64_t first = fields.integer_or("max_window_layers", 28, 0);
    for (std::int64_t i = first; i < num_layers; ++i) windows[static_cast<std::size_t>(i)] = window;
    return windows;
  }
  if (!types->is_array() || types->as_array().size() != windows.size())
    fields.fail("layer_types", types, str("a list of ", num_layers, " names"));
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const Json& type = types->as_array()[i];
    const bool sliding = type == Json("sliding_attention");
    if (!sliding && !(type == Json("full_attention")))
      fields.fail<Unsupported>("layer_types", &type, "full_attention or sliding_attention");
    if (sliding && window == 0) fields.fail("layer_types", &type, "a sliding_window, and use_sliding_window true");
    windows[i] = sliding ? window : 0;
  }
  return windows;
}

void read_architecture_specifics(const JsonFields& fields, const Json& json, ModelConfig& config) {
  config.sliding_window.assign(static_cast<std::size_t>(config.num_layers), 0);
  switch (config.architecture) {
    case Architecture::kLlama:
      config.attention_bias = config.attention_output_bias = fields.boolean_or("attention_bias", false);
      config.mlp_bias = fields.boolean_or("mlp_bias", false);
      break;
    case Architecture::kMistral:
      if (const Json* window = json.find("sliding_window"); window == nullptr || !window->is_null())
        config.sliding_window.assign(config.sliding_window.size(), fields.integer_or("sliding_window", 4096, 1));
      break;
    case Architecture::kQwen2:
      config.attention_bias = true;
      config.sliding_window = read_qwen_windows(fields, json, config.num_layers);
      break;
    case Architecture::kQwen3:
      config.attention_bias = config.attention_output_bias = fields.boolean_or("attention_bias", false);
      config.qk_norm = true;
      config.sliding_window = read_qwen_windows(fields, json, config.num_layers);
      break;
  }
}

}  // namespace

ModelConfig ModelConfig::parse(const Json& json, const Json* generation_config, const std::string& source) {
  const JsonFields fields(json, source);
  ModelConfig config;
  read_architecture(fields, config);
  if (const Json* quantization = fields.find("quantization_config"))
    fields.fail<Unsupported>("quantization_config", quantization, "weights in float32, bfloat16 or float16");
  config.hidden_size = fields.integer("hidden_size", 1);
  config.intermediate_size = fields.integer("intermediate_size", 1);
  config.num_layers = fields.integer("num_hidden_layers", 1, kMaxLayers);
  config.vocab_size = fields.integer("vocab_size", 1);
  config.max_position_embeddings = fields.integer("max_position_embeddings", 1);
  config.rms_norm_eps = fields.positive_or("rms_norm_eps", config.rms_norm_eps);
  config.tie_word_embeddings = fields.boolean_or("tie_word_embeddings", false);
  if (fields.string_or("hidden_act", "silu") != "silu")
    fields.fail<Unsupported>("hidden_act", fields.find("hidden_act"), "silu");
  read_heads(fields, config);
  config.rope = read_rope(fields, config);
  read_architecture_specifics(fields, json, config);
  config.eos_token_ids = read_token_ids(fields, "eos_token_id");
  if (generation_config != nullptr) {
    const JsonFields generation(*generation_config, "generation_config.json beside " + source);
    auto ids = read_token_ids(generation, "eos_token_id");
    if (!ids.empty()) config.eos_token_ids = std::move(ids);
  }
  // What no logit is of can end nothing.
  std::erase_if(config.eos_token_ids, [&](std::int32_t id) { return id >= config.vocab_size; });
  return config;
}

ModelConfig ModelConfig::load(const std::string& directory) {
  const std::filesystem::path folder(directory);
  const auto source = (folder / "config.json").string(), generation = (folder / "generation_config.json").string();
  const Json config = load_json(source);
  std::error_code ignored;
  if (!std::filesystem::exists(generation, ignored)) return parse(config, nullptr, source);
  const Json generation_config = load_json(generation);
  return parse(config, &generation_config, source);
}

}  // namespace flexcore
