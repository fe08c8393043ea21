#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "core/check.h"
#include "core/philox.h"
#include "peft/layout.h"
#include "peft/lora_matcher.h"

namespace flexcore {

namespace {

template <class Value, class Read>
std::vector<std::pair<std::string, Value>> read_patterns(const JsonFields& fields, const char* name, Read&& read) {
  std::vector<std::pair<std::string, Value>> result;
  const Json* patterns = fields.find(name);
  if (patterns == nullptr) return result;
  const JsonFields values(*patterns, str(fields.source(), ": ", name));
  for (const auto& member : patterns->as_object()) result.emplace_back(member.first, read(values, member.first));
  return result;
}

// PEFT's type for alpha is int.
Json alpha_json(double alpha) {
  const auto whole = static_cast<std::int64_t>(std::clamp(alpha, -1e15, 1e15));
  return static_cast<double>(whole) == alpha ? Json(whole) : Json(alpha);
}

}  // namespace

AdapterLayout lay_out(const LoraConfig& config, const Graph& base) {
  const LoraMatcher matcher(config);
  matcher.modules().require_targets(paths_of(base.sites));
  AdapterLayout layout;
  for (std::size_t i = 0; i < base.sites.size(); ++i) {
    const auto& site = base.sites[i];
    const auto resolved = matcher.resolve(site.path);
    if (!resolved) continue;
    require<Unsupported>(!config.use_dora || site.place == LinearSite::Place::kLayer, "target_modules: ", site.path,
                         " with use_dora, wanted linears of the layers");
    AdapterModule module{.bypass = {static_cast<SiteId>(i), config.use_dora ? BypassKind::kDora : BypassKind::kLora},
                         .place = site.place,
                         .path = site.path,
                         .in_features = site.in_features,
                         .out_features = site.out_features,
                         .residual = site.residual,
                         .rank = resolved->rank,
                         .scaling = static_cast<float>(resolved->scaling),
                         .drops = config.use_dora && config.lora_dropout > 0.0};
    const bool embedding = site.place == LinearSite::Place::kEmbedding;
    if (embedding) std::swap(module.in_features, module.out_features);  // from a token to its row
    module.a_offset =
        layout.add(site.path, embedding ? ".lora_embedding_A" : ".lora_A.weight", {module.rank, module.in_features});
    module.b_offset =
        layout.add(site.path, embedding ? ".lora_embedding_B" : ".lora_B.weight", {module.out_features, module.rank});
    if (config.use_dora) {
      module.scale_offset = layout.add(site.path, ".lora_magnitude_vector", {module.out_features});
      module.derived_offset = std::exchange(layout.num_derived, layout.num_derived + 2 * module.out_features);
    }
    layout.modules.push_back(std::move(module));
  }
  add_own_modules(layout, config.modules_to_save, base);
  return layout;
}

// A ~ U(-1/sqrt(in), 1/sqrt(in)) (PEFT's default, kaiming with a = sqrt(5)), B = 0; of an embedding A = 0, B ~ N(0, 1).
// Magnitudes and whole modules come from the weights.
void initialize(const LoraConfig&, const AdapterLayout& layout, std::uint64_t seed, float* parameters) {
  for (const auto& m : layout.modules) {
    if (m.rank == 0) continue;
    const auto counter = [&](std::int64_t i) {
      return (static_cast<std::uint64_t>(m.bypass.site) << 40) | static_cast<std::uint64_t>(i);
    };
    if (m.place == LinearSite::Place::kEmbedding) {
      float* b = parameters + m.b_offset;
      for (std::int64_t i = 0; i < m.rank * m.out_features; ++i) {  // Box and Muller's
        const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform(seed, counter(2 * i))));
        b[i] = static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * uniform(seed, counter(2 * i + 1))));
      }
      continue;
    }
    const float bound = 1.0f / std::sqrt(static_cast<float>(m.in_features));
    float* a = parameters + m.a_offset;
    const std::int64_t size = m.rank * m.in_features;
    for (std::int64_t i = 0; i < size; ++i) {
      a[i] = bound * static_cast<float>(2.0 * uniform(seed, counter(i)) - 1.0);
    }
  }
}

Json::Object to_peft(const LoraConfig& config) {
  Json::Object ranks, alphas;
  for (const auto& [pattern, rank] : config.rank_pattern) ranks.emplace_back(pattern, rank);
  for (const auto& [pattern, alpha] : config.alpha_pattern) alphas.emplace_back(pattern, alpha_json(alpha));
  return {{"alpha_pattern", std::move(alphas)},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"init_lora_weights", true},
          {"layers_pattern", nullptr},
          {"layers_to_transform", nullptr},
          {"lora_alpha", alpha_json(config.lora_alpha)},
          {"lora_dropout", config.lora_dropout},
          {"modules_to_save", config.modules_to_save.empty()
                                  ? Json()
                                  : Json(Json::Array(config.modules_to_save.begin(), config.modules_to_save.end()))},
          {"r", config.r},
          {"rank_pattern", std::move(ranks)},
          {"use_dora", config.use_dora},
          {"use_rslora", config.use_rslora}};
}

LoraConfig lora_from_peft(const JsonFields& fields) {
  LoraConfig config;
  config.r = fields.find("r") == nullptr ? 8 : fields.integer("r", 1);
  config.lora_alpha = fields.number_or("lora_alpha", 8.0);
  config.use_rslora = fields.boolean_or("use_rslora", false);
  config.use_dora = fields.boolean_or("use_dora", false);
  config.rank_pattern = read_patterns<std::int64_t>(
      fields, "rank_pattern", [](auto& values, auto& pattern) { return values.integer(pattern, 1); });
  config.alpha_pattern = read_patterns<double>(fields, "alpha_pattern",
                                               [](auto& values, auto& pattern) { return values.number(pattern); });
  auto [names, is_regex] = names_from_peft(fields, "target_modules");
  config.target_modules = std::move(names);
  config.target_modules_is_regex = is_regex;
  config.modules_to_save = names_from_peft(fields, "modules_to_save").names;
  config.lora_dropout = fields.number_or("lora_dropout", 0.0);
  if (config.lora_dropout < 0 || config.lora_dropout >= 1)
    fields.fail("lora_dropout", fields.find("lora_dropout"), "a number in [0, 1)");
  return config;
}

}  // namespace flexcore
