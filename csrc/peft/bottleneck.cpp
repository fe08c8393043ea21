#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/number.h"
#include "core/philox.h"
#include "peft/layout.h"
#include "peft/lora_matcher.h"

namespace flexcore {

namespace {

constexpr std::pair<const char*, Activation> kActivations[] = {
    {"relu", Activation::kRelu}, {"tanh", Activation::kTanh}, {"gelu", Activation::kGelu}, {"silu", Activation::kSilu}};

Activation activation_of(const BottleneckConfig& config) {
  for (const auto& [name, activation] : kActivations)
    if (config.non_linearity == name) return activation;
  throw InvalidArgument(
      str("non_linearity: \"", config.non_linearity, "\", wanted \"relu\", \"tanh\", \"gelu\" or \"silu\""));
}

}  // namespace

AdapterLayout lay_out(const BottleneckConfig& config, const Graph& base) {
  require(config.bottleneck_size >= 1 && config.bottleneck_size <= LoraMatcher::kMaxRank,
          "bottleneck_size: ", config.bottleneck_size, ", wanted 1 to ", LoraMatcher::kMaxRank);
  require(fits_float(config.scaling), "scaling: ", config.scaling, ", wanted finite as float32");
  const Activation activation = activation_of(config);
  const ModuleMatcher targets("target_modules", config.target_modules, config.target_modules_is_regex);
  targets.require_targets(paths_of(base.layer_sites()));
  AdapterLayout layout;
  for (std::size_t i = 0; i < base.layer_sites().size(); ++i) {
    const auto& site = base.sites[i];
    if (!targets.targets(site.path)) continue;
    AdapterModule module{
        .bypass = {static_cast<SiteId>(i), config.use_parallel_adapter ? BypassKind::kLora : BypassKind::kSeries},
        .path = site.path,
        .in_features = config.use_parallel_adapter ? site.in_features : site.out_features,
        .out_features = site.out_features,
        .residual = site.residual,
        .rank = config.bottleneck_size,
        .scaling = static_cast<float>(config.scaling),
        .activation = activation};
    module.a_offset = layout.add(site.path, ".adapter_down.weight", {module.rank, module.in_features});
    module.b_offset = layout.add(site.path, ".adapter_up.weight", {module.out_features, module.rank});
    layout.modules.push_back(std::move(module));
  }
  return layout;
}

// W_down ~ U(-1/sqrt(in), 1/sqrt(in)), W_up = 0 (He et al., arXiv 2110.04366): a new adapter changes nothing.
void initialize(const BottleneckConfig&, const AdapterLayout& layout, std::uint64_t seed, float* parameters) {
  initialize(LoraConfig{}, layout, seed, parameters);
}

Json::Object to_peft(const BottleneckConfig& config) {
  return {{"adapter_dropout", 0.0},
          {"bias", "none"},
          {"bottleneck_size", config.bottleneck_size},
          {"init_weights", "mam_adapter"},
          {"modules_to_save", nullptr},
          {"non_linearity", config.non_linearity},
          {"scaling", config.scaling},
          {"use_parallel_adapter", config.use_parallel_adapter}};
}

BottleneckConfig bottleneck_from_peft(const JsonFields& fields) {
  BottleneckConfig config;
  config.bottleneck_size = fields.integer_or("bottleneck_size", 256, 1);
  config.non_linearity = fields.string_or("non_linearity", "tanh");
  const Json* scaling = fields.find("scaling");
  if (scaling != nullptr && scaling->is_string())
    fields.fail<Unsupported>("scaling", scaling, "a number: flexcore does not learn it");
  config.scaling = fields.number_or("scaling", 1.0);
  config.use_parallel_adapter = fields.boolean_or("use_parallel_adapter", false);
  auto [names, is_regex] = names_from_peft(fields, "target_modules");
  config.target_modules = std::move(names);
  config.target_modules_is_regex = is_regex;
  return config;
}

}  // namespace flexcore
