#include "peft/layout.h"

#include <algorithm>
#include <cctype>
#include <utility>

#include "core/check.h"
#include "peft/module_matcher.h"

namespace flexcore {

std::int64_t AdapterArray::size() const {
  std::int64_t size = 1;
  for (const auto extent : shape) size *= extent;
  return size;
}

std::string peft_key(const AdapterArray& array) {
  return array.module.empty() ? array.suffix : "base_model.model." + array.module + array.suffix;
}

void with_virtual_tokens(std::span<const std::int32_t> token_ids, std::int64_t num_virtual_tokens,
                         std::vector<std::int32_t>& all) {
  all.clear();
  for (std::int64_t i = 0; i < num_virtual_tokens; ++i) all.push_back(static_cast<std::int32_t>(-1 - i));
  all.insert(all.end(), token_ids.begin(), token_ids.end());
}

BypassSet AdapterLayout::bypasses() const {
  BypassSet bypasses;
  for (const auto& module : modules) {
    bypasses.insert(module.bypass);
    if (module.drops) bypasses.insert({module.bypass.site, BypassKind::kDropped});
  }
  return bypasses;
}

const AdapterModule* AdapterLayout::find(SiteId site) const {
  const auto found =
      std::find_if(modules.rbegin(), modules.rend(), [&](const auto& module) { return module.bypass.site <= site; });
  return found != modules.rend() && found->bypass.site == site ? &*found : nullptr;
}

void add_own_modules(AdapterLayout& layout, const std::vector<std::string>& modules_to_save, const Graph& base) {
  for (const auto& name : modules_to_save) {
    bool found = false;
    for (std::size_t i = 0; i < base.sites.size(); ++i) {
      const LinearSite& site = base.sites[i];
      if (site.place == LinearSite::Place::kLayer || !is_suffix(site.path, name)) continue;
      found = true;
      const auto id = static_cast<SiteId>(i);
      const AdapterModule* other = layout.find(id);
      require(other == nullptr, "modules_to_save: \"", name, "\": ", site.path, " is ",
              other != nullptr && other->bypass.kind == BypassKind::kOwnWeight ? "there twice"
                                                                               : "one of the target_modules too");
      AdapterModule module{.bypass = {id, BypassKind::kOwnWeight},
                           .place = site.place,
                           .path = site.path,
                           .in_features = site.in_features,
                           .out_features = site.out_features};
      module.weight_offset = layout.add(site.path, ".weight", {site.out_features, site.in_features});
      const auto behind =
          std::find_if(layout.modules.begin(), layout.modules.end(), [&](const auto& m) { return m.bypass.site > id; });
      layout.modules.insert(behind, std::move(module));
    }
    require<Unsupported>(found, "modules_to_save: \"", name, "\", wanted \"embed_tokens\" or \"lm_head\"");
  }
}

std::int64_t AdapterLayout::add(const std::string& module, const char* suffix, std::vector<std::int64_t> shape) {
  arrays.push_back({module, suffix, std::move(shape), num_parameters});
  num_parameters += arrays.back().size();
  return arrays.back().offset;
}

AdapterLayout lay_out(const AdapterConfig& config, const Graph& base) {
  return std::visit([&](const auto& method) { return lay_out(method, base); }, config);
}

std::string peft_type(const AdapterConfig& config) {
  constexpr const char* kTypes[] = {"LORA", "IA3", "BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING"};
  return kTypes[config.index()];
}

BypassForm lora_form(std::int64_t in_features, std::int64_t out_features, std::int64_t rank) {
  using Kind = BypassStep::Kind;
  return {{{Kind::kLinear, "A", in_features, rank}, {Kind::kLinear, "B", rank, out_features}}};
}

BypassForm form_of(const AdapterModule& module) {
  using Kind = BypassStep::Kind;
  require<Unsupported>(module.place == LinearSite::Place::kLayer,
                       "tensor_parallel_size: plans adapters of the layers, not of ", module.path);
  switch (module.bypass.kind) {
    case BypassKind::kLora:
    case BypassKind::kSeries: {
      BypassForm form = lora_form(module.in_features, module.out_features, module.rank);
      if (module.activation != Activation::kNone)
        form.steps.insert(form.steps.begin() + 1, {Kind::kActivation, "act", module.rank, module.rank});
      return form;
    }
    case BypassKind::kOutputScale:
      return {{{Kind::kVector, "l", module.out_features, module.out_features}}};
    case BypassKind::kInputScale:
      return {{{Kind::kVector, "l", module.in_features, module.in_features}}};
    default:
      throw Unsupported("tensor_parallel_size: plans LoRA, (IA)^3 and bottleneck adapters, not DoRA or virtual tokens");
  }
}

ModuleNames names_from_peft(const JsonFields& fields, const char* option) {
  const Json* value = fields.find(option);
  ModuleNames result;
  if (value == nullptr) return result;
  if (value->is_string()) {
    std::string lower = value->as_string();
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    result.is_regex = lower != "all-linear";
    result.names = {result.is_regex ? value->as_string() : lower};
    return result;
  }
  if (!value->is_array()) fields.fail(option, value, "a list of names or a string");
  for (const auto& name : value->as_array()) {
    if (!name.is_string()) fields.fail(option, value, "a list of names or a string");
    result.names.push_back(name.as_string());
  }
  return result;
}

std::vector<std::string> paths_of(std::span<const LinearSite> sites) {
  std::vector<std::string> paths;
  for (const auto& site : sites) paths.push_back(site.path);
  return paths;
}

}  // namespace flexcore
