#include "peft/adapter_store.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "core/philox.h"
#include "peft/lora_matcher.h"

namespace flexcore {

std::set<SiteId> Adapter::sites() const {
  std::set<SiteId> sites;
  for (const auto& module : modules) sites.insert(module.site);
  return sites;
}

std::vector<float> Adapter::download() const {
  std::vector<float> host(static_cast<std::size_t>(num_parameters));
  params_.allocator().download(host.data(), params_.data(), params_.bytes());
  return host;
}

LoraSegment Adapter::segment(const LoraModule& module, std::int64_t begin, std::int64_t end, float* gradients) const {
  return {.begin = begin,
          .end = end,
          .lora_a = parameters() + module.a_offset,
          .lora_b = parameters() + module.b_offset,
          .rank = module.rank,
          .scaling = module.scaling,
          .grad_a = gradients == nullptr ? nullptr : gradients + module.a_offset,
          .grad_b = gradients == nullptr ? nullptr : gradients + module.b_offset};
}

std::string peft_key(const LoraModule& module, bool is_a) { return peft_tensor_name(module.path, is_a ? 'A' : 'B'); }

std::vector<LoraWeights> lora_weights(const Adapter& adapter, const float* arrays) {
  std::vector<LoraWeights> weights;
  for (const auto& m : adapter.modules) {
    const auto* a = arrays + m.a_offset;
    const auto* b = arrays + m.b_offset;
    weights.push_back({m.path,
                       m.rank,
                       m.in_features,
                       m.out_features,
                       {a, a + m.rank * m.in_features},
                       {b, b + m.out_features * m.rank}});
  }
  return weights;
}

AdapterStore::AdapterStore(const std::vector<LinearSite>& sites, Allocator& allocator, MemoryLedger& ledger)
    : sites_(sites), allocator_(allocator), ledger_(ledger) {}

std::vector<LoraModule> lora_modules(const LoraMatcher& matcher, const std::vector<LinearSite>& sites) {
  std::vector<LoraModule> modules;
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < sites.size(); ++i) {
    const auto& site = sites[i];
    const auto resolved = matcher.resolve(site.path);
    if (!resolved) continue;
    LoraModule module{.site = static_cast<SiteId>(i),
                      .rank = resolved->rank,
                      .scaling = static_cast<float>(resolved->scaling),
                      .in_features = site.in_features,
                      .out_features = site.out_features,
                      .a_offset = offset,
                      .path = site.path};
    module.b_offset = offset + module.rank * module.in_features;
    offset = module.b_offset + module.out_features * module.rank;
    modules.push_back(std::move(module));
  }
  return modules;
}

std::int64_t num_parameters(const std::vector<LoraModule>& modules) {
  return modules.empty() ? 0 : modules.back().b_offset + modules.back().out_features * modules.back().rank;
}

void require_targets(const LoraMatcher& matcher, const std::vector<LinearSite>& sites) {
  std::vector<std::string> paths;
  for (const auto& site : sites) paths.push_back(site.path);
  matcher.require_targets(paths);
}

void AdapterStore::require_free(const std::string& name) const {
  require(!newest_.contains(name), "adapter \"", name, "\" is loaded already; unload it first");
}

// Parameters of all modules in one buffer, A then B of each, site by site.
std::shared_ptr<Adapter> AdapterStore::layout(const std::string& name, const LoraConfig& config,
                                              const LoraMatcher& matcher) {
  require(!name.empty(), "adapter name: empty, wanted at least one character");
  auto adapter = std::make_shared<Adapter>();
  adapter->name = name;
  adapter->config = config;
  adapter->modules = lora_modules(matcher, sites_);
  adapter->num_parameters = num_parameters(adapter->modules);
  adapter->params_ = Buffer(allocator_, ledger_, MemoryTag::kAdapters,
                            static_cast<std::size_t>(adapter->num_parameters) * sizeof(float));
  adapter->uid = next_uid_++;
  return adapter;
}

std::shared_ptr<Adapter> AdapterStore::create(const std::string& name, const LoraConfig& config, std::uint64_t seed) {
  require_free(name);
  const LoraMatcher matcher(config);
  require_targets(matcher, sites_);
  auto adapter = layout(name, config, matcher);
  std::vector<float> parameters(static_cast<std::size_t>(adapter->num_parameters));  // B stays 0
  for (const auto& m : adapter->modules) {
    const float bound = 1.0f / std::sqrt(static_cast<float>(m.in_features));
    float* a = parameters.data() + m.a_offset;
    const std::int64_t size = m.rank * m.in_features;
    for (std::int64_t i = 0; i < size; ++i) {
      const auto counter = (static_cast<std::uint64_t>(m.site) << 40) | static_cast<std::uint64_t>(i);
      a[i] = bound * static_cast<float>(2.0 * uniform(seed, counter) - 1.0);
    }
  }
  allocator_.upload(adapter->parameters(), parameters.data(), adapter->bytes());
  publish(adapter);
  return adapter;
}

std::shared_ptr<Adapter> AdapterStore::load(const std::string& name, const std::string& directory) {
  require_free(name);
  auto adapter = read(name, directory);
  publish(adapter);
  return adapter;
}

std::shared_ptr<Adapter> AdapterStore::read(const std::string& name, const std::string& directory) {
  const PeftAdapter file = read_peft(directory);
  auto adapter = layout(name, file.config, LoraMatcher(file.config));
  require(adapter->modules.size() == file.modules.size(), directory, ": adapter has ", file.modules.size(),
          " modules, this model ", adapter->modules.size(), " for its target_modules; is it for another base model (",
          file.base_model.empty() ? "not named" : file.base_model, ")?");
  std::vector<float> parameters(static_cast<std::size_t>(adapter->num_parameters));
  for (const auto& weights : file.modules) {
    const auto module = std::find_if(adapter->modules.begin(), adapter->modules.end(),
                                     [&](const LoraModule& m) { return m.path == weights.module; });
    require(module != adapter->modules.end(), directory, ": module ", weights.module,
            " is not a linear of this model; is the adapter for another base model?");
    require(module->rank == weights.rank && module->in_features == weights.in_features &&
                module->out_features == weights.out_features,
            directory, ": ", weights.module, " has rank ", weights.rank, ", in_features ", weights.in_features,
            ", out_features ", weights.out_features, ", wanted ", module->rank, ", ", module->in_features, ", ",
            module->out_features, "; is the adapter for another base model?");
    std::copy(weights.lora_a.begin(), weights.lora_a.end(), parameters.begin() + module->a_offset);
    std::copy(weights.lora_b.begin(), weights.lora_b.end(), parameters.begin() + module->b_offset);
  }
  allocator_.upload(adapter->parameters(), parameters.data(), adapter->bytes());
  adapter->lora_dropout = file.lora_dropout;
  return adapter;
}

void AdapterStore::remove(const std::string& name) {
  get(name);
  newest_.erase(name);
}

std::shared_ptr<Adapter> AdapterStore::get(const std::string& name) const {
  const auto adapter = newest_.find(name);
  if (adapter != newest_.end()) return adapter->second;
  std::string known;
  for (const auto& [other, unused] : newest_) known += (known.empty() ? "\"" : ", \"") + other + "\"";
  throw InvalidArgument(
      str("adapter: \"", name, "\" is not loaded, wanted ", known.empty() ? "none: no adapter is" : known));
}

std::vector<std::shared_ptr<Adapter>> AdapterStore::all() const {
  std::vector<std::shared_ptr<Adapter>> adapters;
  for (const auto& [name, adapter] : newest_) adapters.push_back(adapter);
  return adapters;
}

std::shared_ptr<Adapter> AdapterStore::next_version(const Adapter& newest) const {
  auto copy = std::make_shared<Adapter>();
  copy->name = newest.name;
  copy->uid = newest.uid;
  copy->version = newest.version + 1;
  copy->config = newest.config;
  copy->modules = newest.modules;
  copy->num_parameters = newest.num_parameters;
  copy->lora_dropout = newest.lora_dropout;
  copy->params_ = Buffer(allocator_, ledger_, MemoryTag::kAdapters, newest.bytes());
  allocator_.copy(copy->parameters(), newest.parameters(), newest.bytes());
  return copy;
}

void AdapterStore::publish(std::shared_ptr<Adapter> adapter) {
  auto& newest = newest_[adapter->name];
  newest = std::move(adapter);
}

}  // namespace flexcore
