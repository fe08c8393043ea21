#include <cmath>
#include <numbers>
#include <utility>

#include "core/check.h"
#include "core/philox.h"
#include "peft/layout.h"

namespace flexcore {

namespace {

constexpr std::int64_t kMostVirtualTokens = 4096;
constexpr const char* kTensor = "prompt_embeddings";

std::int64_t kv_width(const Graph& base) { return base.tensor(base.keys_values.at(0).first).width; }

void require_count(std::int64_t count) {
  require(count >= 1 && count <= kMostVirtualTokens, "num_virtual_tokens: ", count, ", wanted 1 to ",
          kMostVirtualTokens);
}

void complete(std::int64_t& field, const char* name, std::int64_t wanted) {
  require(field == 0 || field == wanted, name, ": ", field, ", wanted ", wanted, " as in this model, or 0");
  field = wanted;
}

template <class Config>
void complete_heads(Config& config, const Graph& base, std::int64_t heads, std::int64_t width) {
  complete(config.num_layers, "num_layers", base.num_layers);
  complete(config.num_attention_heads, "num_attention_heads", heads);
  complete(config.token_dim, "token_dim", width);
}

// Normal numbers of deviation 0.02, by Box and Muller.
void fill_normal(const AdapterLayout& layout, std::uint64_t seed, float* parameters) {
  for (std::int64_t i = 0; i < layout.num_parameters; ++i) {
    const auto counter = static_cast<std::uint64_t>(2 * i);
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(seed, counter)));
    parameters[i] = static_cast<float>(0.02 * radius * std::cos(2.0 * std::numbers::pi * uniform(seed, counter + 1)));
  }
}

template <class Config>
Json::Object dimensions(const Config& config) {
  return {{"num_attention_heads", config.num_attention_heads},
          {"num_layers", config.num_layers},
          {"num_transformer_submodules", 1},
          {"num_virtual_tokens", config.num_virtual_tokens},
          {"token_dim", config.token_dim}};
}

template <class Config>
Config read_dimensions(const JsonFields& fields) {
  Config config;
  config.num_virtual_tokens = fields.integer("num_virtual_tokens", 1);
  config.token_dim = fields.integer_or("token_dim", 0, 0);
  config.num_layers = fields.integer_or("num_layers", 0, 0);
  config.num_attention_heads = fields.integer_or("num_attention_heads", 0, 0);
  if (fields.integer_or("num_transformer_submodules", 1, 1) != 1)
    fields.fail<Unsupported>("num_transformer_submodules", fields.find("num_transformer_submodules"),
                             "1, a decoder alone");
  return config;
}

}  // namespace

AdapterConfig completed(AdapterConfig config, const Graph& base) {
  if (auto* prompt = std::get_if<PromptTuningConfig>(&config))
    complete_heads(*prompt, base, base.num_heads, base.tensor(base.hidden).width);
  if (auto* prefix = std::get_if<PrefixTuningConfig>(&config))
    complete_heads(*prefix, base, base.num_kv_heads, kv_width(base));
  return config;
}

AdapterLayout lay_out(const PromptTuningConfig& config, const Graph& base) {
  require_count(config.num_virtual_tokens);
  AdapterLayout layout;
  layout.num_virtual_tokens = config.num_virtual_tokens;
  layout.modules.push_back({.bypass = {0, BypassKind::kPrompt}});
  layout.add("", kTensor, {config.num_virtual_tokens, base.tensor(base.hidden).width});
  return layout;
}

AdapterLayout lay_out(const PrefixTuningConfig& config, const Graph& base) {
  require_count(config.num_virtual_tokens);
  AdapterLayout layout;
  layout.num_virtual_tokens = config.num_virtual_tokens;
  for (int layer = 0; layer < base.num_layers; ++layer)
    layout.modules.push_back({.bypass = {layer, BypassKind::kPrefix}});
  layout.add("", kTensor, {config.num_virtual_tokens, 2 * base.num_layers * kv_width(base)});
  return layout;
}

// Those of init_token_ids come from the weights.
void initialize(const PromptTuningConfig&, const AdapterLayout& layout, std::uint64_t seed, float* parameters) {
  fill_normal(layout, seed, parameters);
}

void initialize(const PrefixTuningConfig&, const AdapterLayout& layout, std::uint64_t seed, float* parameters) {
  fill_normal(layout, seed, parameters);
}

Json::Object to_peft(const PromptTuningConfig& config) {
  Json::Object json = dimensions(config);
  json.emplace_back("prompt_tuning_init", "RANDOM");
  return json;
}

Json::Object to_peft(const PrefixTuningConfig& config) {
  Json::Object json = dimensions(config);
  json.emplace_back("encoder_hidden_size", config.token_dim);
  json.emplace_back("prefix_projection", false);
  return json;
}

PromptTuningConfig prompt_tuning_from_peft(const JsonFields& fields) {
  return read_dimensions<PromptTuningConfig>(fields);
}

// A projection is applied before PEFT saves: what a file holds are keys and values.
PrefixTuningConfig prefix_tuning_from_peft(const JsonFields& fields) {
  return read_dimensions<PrefixTuningConfig>(fields);
}

}  // namespace flexcore
