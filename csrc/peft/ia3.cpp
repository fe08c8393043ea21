#include <algorithm>
#include <utility>

#include "core/check.h"
#include "peft/layout.h"
#include "peft/module_matcher.h"

namespace flexcore {

namespace {

ModuleMatcher feedforward_matcher(const IA3Config& config) {
  return {"feedforward_modules", config.feedforward_modules, config.feedforward_modules_is_regex};
}

}  // namespace

AdapterLayout lay_out(const IA3Config& config, const Graph& base) {
  const ModuleMatcher targets("target_modules", config.target_modules, config.target_modules_is_regex);
  targets.require_targets(paths_of(base.layer_sites()));
  const ModuleMatcher feedforward = feedforward_matcher(config);
  if (!config.feedforward_modules.empty()) feedforward.require_targets(paths_of(base.layer_sites()));
  AdapterLayout layout;
  for (std::size_t i = 0; i < base.layer_sites().size(); ++i) {
    const auto& site = base.sites[i];
    if (!targets.targets(site.path)) continue;
    const bool of_input = feedforward.targets(site.path);
    require<Unsupported>(!of_input || site.sole_reader, "feedforward_modules: ", site.path,
                         ": other linears read the same input, wanted a linear that alone reads it");
    layout.modules.push_back(
        {.bypass = {static_cast<SiteId>(i), of_input ? BypassKind::kInputScale : BypassKind::kOutputScale},
         .path = site.path,
         .in_features = site.in_features,
         .out_features = site.out_features,
         .residual = site.residual,
         .scale_offset = of_input ? layout.add(site.path, ".ia3_l", {1, site.in_features})
                                  : layout.add(site.path, ".ia3_l", {site.out_features, 1})});
  }
  return layout;
}

void initialize(const IA3Config&, const AdapterLayout& layout, std::uint64_t, float* parameters) {
  std::fill_n(parameters, layout.num_parameters, 1.0f);
}

Json::Object to_peft(const IA3Config& config) {
  Json feedforward = config.feedforward_modules_is_regex
                         ? Json(config.feedforward_modules.at(0))
                         : Json(Json::Array(config.feedforward_modules.begin(), config.feedforward_modules.end()));
  return {{"fan_in_fan_out", false},
          {"feedforward_modules", std::move(feedforward)},
          {"init_ia3_weights", true},
          {"modules_to_save", nullptr}};
}

IA3Config ia3_from_peft(const JsonFields& fields) {
  IA3Config config;
  auto [targets, targets_regex] = names_from_peft(fields, "target_modules");
  config.target_modules = std::move(targets);
  config.target_modules_is_regex = targets_regex;
  auto [feedforward, feedforward_regex] = names_from_peft(fields, "feedforward_modules");
  config.feedforward_modules = std::move(feedforward);
  config.feedforward_modules_is_regex = feedforward_regex;
  return config;
}

}  // namespace flexcore
