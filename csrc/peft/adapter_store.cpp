#include "peft/adapter_store.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "ops/dora.h"
#include "ops/rows.h"

namespace flexcore {

namespace {

/// visit(index, offset) for every module that is whole, packed one after the other; returns the bytes of all.
template <class Visit>
std::size_t over_own_modules(OpContext& context, const AdapterLayout& layout, DType dtype, Visit&& visit) {
  constexpr std::size_t kAlignment = 64;
  std::size_t offset = 0;
  for (std::size_t i = 0; i < layout.modules.size(); ++i) {
    const AdapterModule& m = layout.modules[i];
    if (m.bypass.kind != BypassKind::kOwnWeight) continue;
    visit(i, offset);
    std::size_t bytes = 0;
    run(context, PackedWeightBytesArgs{m.out_features, m.in_features, dtype, &bytes});
    offset += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  return offset;
}

}  // namespace

std::vector<float> Adapter::download() const {
  std::vector<float> host(static_cast<std::size_t>(layout.num_parameters));
  params_.allocator().download(host.data(), params_.data(), params_.bytes());
  return host;
}

double Adapter::dropout() const {
  const auto* lora = std::get_if<LoraConfig>(&config);
  return lora == nullptr ? 0.0 : lora->lora_dropout;
}

LoraSegment Adapter::lora_segment(const AdapterModule& module, std::int64_t begin, std::int64_t end,
                                  float* gradients) const {
  return {.begin = begin,
          .end = end,
          .lora_a = parameters() + module.a_offset,
          .lora_b = parameters() + module.b_offset,
          .rank = module.rank,
          .scaling = module.scaling,
          .grad_a = gradients == nullptr ? nullptr : gradients + module.a_offset,
          .grad_b = gradients == nullptr ? nullptr : gradients + module.b_offset,
          .activation = module.activation};
}

void Adapter::add_rows(const AdapterModule& module, std::int64_t begin, std::int64_t end, float* gradients,
                       const SegmentDropout* dropout, SiteSegments& site) const {
  const auto scale = [&](const float* values) {
    return ScaleSegment{.begin = begin,
                        .end = end,
                        .scale = values,
                        .grad_scale = gradients == nullptr ? nullptr : gradients + module.scale_offset};
  };
  const auto of_site = [&](SegmentDropout dropped) {
    dropped.mask.module = static_cast<std::uint32_t>(module.bypass.site);
    return dropped;
  };
  const auto add_lora = [&](std::vector<LoraSegment>& segments, std::vector<SegmentDropout>& dropouts) {
    segments.push_back(lora_segment(module, begin, end, gradients));
    if (dropout == nullptr && dropouts.empty()) return;
    dropouts.resize(segments.size());
    if (dropout != nullptr) dropouts.back() = of_site(*dropout);
  };
  switch (module.bypass.kind) {
    case BypassKind::kOwnWeight:
      site.own.push_back({.begin = begin,
                          .end = end,
                          .weight = own_weights_[static_cast<std::size_t>(&module - layout.modules.data())],
                          .grad_weight = gradients == nullptr ? nullptr : gradients + module.weight_offset});
      return;
    case BypassKind::kLora:
      if (module.place == LinearSite::Place::kEmbedding) dropout = nullptr;  // as in PEFT
      add_lora(site.lora, site.dropout);
      return;
    case BypassKind::kDora: {
      // Without a residual the linear's output is its product.
      add_lora(module.residual ? site.product_lora : site.lora, module.residual ? site.product_dropout : site.dropout);
      if (dropout != nullptr) site.dropped.push_back({begin, end, of_site(*dropout)});
      const float* norm = derived() + module.derived_offset;
      ScaleSegment segment = scale(norm + module.out_features);
      segment.offset = bias_[static_cast<std::size_t>(&module - layout.modules.data())];
      segment.grad_divisor = norm;
      site.output_scale.push_back(segment);
      return;
    }
    case BypassKind::kOutputScale:
      site.output_scale.push_back(scale(parameters() + module.scale_offset));
      return;
    case BypassKind::kInputScale:
      site.input_scale.push_back(scale(parameters() + module.scale_offset));
      return;
    case BypassKind::kSeries:
      site.series.push_back(lora_segment(module, begin, end, gradients));
      return;
    case BypassKind::kDropped:  // with kDora
    case BypassKind::kPrompt:
    case BypassKind::kPrefix:  // rows of their own
      return;
  }
}

std::optional<VirtualRows> Adapter::virtual_rows(std::int64_t position, std::int64_t begin, std::int64_t end,
                                                 float* gradients) const {
  if (position >= layout.num_virtual_tokens) return {};
  const std::int64_t count = std::min(end - begin, layout.num_virtual_tokens - position);
  const AdapterArray& array = layout.arrays.front();
  const auto rows = [&](float* values) {
    return TensorView(values + array.offset, DType::kFloat32, {array.shape[0], array.shape[1]})
        .rows(position, position + count);
  };
  VirtualRows result{.begin = begin, .end = begin + count};
  const bool is_prompt = layout.modules.front().bypass.kind == BypassKind::kPrompt;
  (is_prompt ? result.prompt : result.prefix) = rows(parameters());
  if (gradients != nullptr) result.grad = rows(gradients);
  return result;
}

std::vector<AdapterTensor> adapter_tensors(const Adapter& adapter, const float* values) {
  std::vector<AdapterTensor> tensors;
  for (const auto& array : adapter.layout.arrays)
    tensors.push_back({array, {values + array.offset, values + array.offset + array.size()}});
  return tensors;
}

AdapterStore::AdapterStore(const Graph& base, OpContext& context, const WeightStore& weights, Allocator& allocator,
                           MemoryLedger& ledger)
    : base_(base), context_(context), weights_(weights), allocator_(allocator), ledger_(ledger) {}

void AdapterStore::require_free(const std::string& name) const {
  require(!newest_.contains(name), "adapter \"", name, "\" is loaded already; unload it first");
}

void AdapterStore::allocate(Adapter& adapter) const {
  const auto bytes = [](std::int64_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); };
  adapter.params_ = Buffer(allocator_, ledger_, MemoryTag::kAdapters, bytes(adapter.layout.num_parameters));
  if (adapter.layout.num_derived > 0)
    adapter.derived_ = Buffer(allocator_, ledger_, MemoryTag::kAdapters, bytes(adapter.layout.num_derived));
  const DType dtype = weights_.matrix(base_.params.front().name).dtype;
  const std::size_t own = own_module_bytes(context_, adapter.layout, dtype);
  if (own == 0) return;
  adapter.own_ = Buffer(allocator_, ledger_, MemoryTag::kAdapters, own);
  adapter.own_weights_.assign(adapter.layout.modules.size(), {});
  over_own_modules(context_, adapter.layout, dtype, [&](std::size_t i, std::size_t offset) {
    const AdapterModule& m = adapter.layout.modules[i];
    adapter.own_weights_[i] = {adapter.own_.data() + offset, dtype, m.out_features, m.in_features, true};
  });
}

std::shared_ptr<Adapter> AdapterStore::place(const std::string& name, const AdapterConfig& config,
                                             AdapterLayout layout) {
  require(!name.empty(), "adapter name: empty, wanted at least one character");
  auto adapter = std::make_shared<Adapter>();
  adapter->name = name;
  adapter->config = completed(config, base_);
  adapter->layout = std::move(layout);
  for (const auto& module : adapter->layout.modules) {
    adapter->bias_.push_back(module.bypass.kind == BypassKind::kDora &&
                                     base_.sites[static_cast<std::size_t>(module.bypass.site)].bias
                                 ? weights_.vector(module.path + ".bias").as<float>()
                                 : nullptr);
    adapter->plain_lora_ = adapter->plain_lora_ && module.bypass.kind == BypassKind::kLora &&
                           module.activation == Activation::kNone && module.place != LinearSite::Place::kEmbedding;
  }
  allocate(*adapter);
  adapter->uid = next_uid_++;
  return adapter;
}

// Rows of a matrix of the base model, as numbers on the device.
void AdapterStore::look_up(const std::vector<std::int32_t>& ids, const WeightView& table, float* rows) const {
  const Arena::Scope scope(*context_.scratch);
  const auto count = static_cast<std::int64_t>(ids.size());
  const TensorView on_device = context_.scratch->tensor(DType::kInt32, {count});
  allocator_.upload(on_device.data(), ids.data(), on_device.bytes());
  run(context_, EmbeddingArgs{on_device, table, TensorView(rows, DType::kFloat32, {count, table.in_features})});
}

// What modules of their own begin as.
void AdapterStore::copy_modules(Adapter& adapter) const {
  constexpr std::int64_t kRows = 4096;
  for (const auto& m : adapter.layout.modules) {
    if (m.bypass.kind != BypassKind::kOwnWeight) continue;
    const WeightView weight = base_weight(m);
    std::vector<std::int32_t> ids;
    for (std::int64_t first = 0; first < m.out_features; first += kRows) {
      ids.resize(static_cast<std::size_t>(std::min(kRows, m.out_features - first)));
      std::iota(ids.begin(), ids.end(), static_cast<std::int32_t>(first));
      look_up(ids, weight, adapter.parameters() + m.weight_offset + first * m.in_features);
    }
  }
}

WeightView AdapterStore::base_weight(const AdapterModule& module) const {
  const LinearSite& site = base_.sites[static_cast<std::size_t>(module.bypass.site)];
  return weights_.matrix(base_.params[static_cast<std::size_t>(site.weight)].name);
}

// The newest parameters, as products read them.
void AdapterStore::pack_modules(Adapter& adapter) const {
  for (std::size_t i = 0; i < adapter.own_weights_.size(); ++i) {
    const WeightView& weight = adapter.own_weights_[i];
    if (weight.data == nullptr) continue;
    const AdapterModule& m = adapter.layout.modules[i];
    run(context_, PackWeightArgs{.source = TensorView(adapter.parameters() + m.weight_offset, DType::kFloat32,
                                                      {m.out_features, m.in_features}),
                                 .dtype = weight.dtype,
                                 .packed = const_cast<void*>(weight.data),
                                 .on_device = true});
  }
}

std::size_t own_module_bytes(OpContext& context, const AdapterLayout& layout, DType dtype) {
  return over_own_modules(context, layout, dtype, [](std::size_t, std::size_t) {});
}

// Virtual tokens begin as these, in turn.
void AdapterStore::embed(Adapter& adapter, const std::vector<std::int32_t>& token_ids) const {
  if (token_ids.empty()) return;
  const GraphParam& table = base_.params.front();
  for (const auto id : token_ids)
    require(id >= 0 && id < table.out_features, "init_token_ids: unknown token id ", id, ", wanted 0 <= id < ",
            table.out_features);
  const std::int64_t count = adapter.layout.num_virtual_tokens;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = token_ids[i % token_ids.size()];
  look_up(ids, weights_.matrix(table.name), adapter.parameters());
}

// Modules of their own, packed; norms and scales of DoRA's rows.
void AdapterStore::derive(Adapter& adapter, bool magnitudes_are_norms) const {
  pack_modules(adapter);
  for (const auto& m : adapter.layout.modules) {
    if (m.bypass.kind != BypassKind::kDora) continue;
    float* norm = adapter.derived() + m.derived_offset;
    float* magnitude = adapter.parameters() + m.scale_offset;
    run(context_, DoraScaleArgs{.weight = weights_.matrix(m.path + ".weight"),
                                .lora_a = adapter.parameters() + m.a_offset,
                                .lora_b = adapter.parameters() + m.b_offset,
                                .rank = m.rank,
                                .scaling = m.scaling,
                                .magnitude = magnitudes_are_norms ? nullptr : magnitude,
                                .norm = TensorView(norm, DType::kFloat32, {m.out_features}),
                                .scale = TensorView(norm + m.out_features, DType::kFloat32, {m.out_features})});
    if (magnitudes_are_norms)
      run(context_, CopyArgs{TensorView(norm, DType::kFloat32, {1, m.out_features}),
                             TensorView(magnitude, DType::kFloat32, {1, m.out_features})});
  }
}

std::shared_ptr<Adapter> AdapterStore::create(const std::string& name, const AdapterConfig& config,
                                              std::uint64_t seed) {
  require_free(name);
  auto adapter = place(name, config, lay_out(config, base_));
  std::vector<float> parameters(static_cast<std::size_t>(adapter->layout.num_parameters));
  std::visit([&](const auto& method) { initialize(method, adapter->layout, seed, parameters.data()); }, config);
  allocator_.upload(adapter->parameters(), parameters.data(), adapter->bytes());
  if (const auto* prompt = std::get_if<PromptTuningConfig>(&config)) embed(*adapter, prompt->init_token_ids);
  copy_modules(*adapter);
  derive(*adapter, true);
  newest_[name] = adapter;
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
  auto adapter = place(name, file.config, lay_out(file.config, base_));
  const auto shape_text = [](const std::vector<std::int64_t>& shape) {
    std::string text;
    for (const auto extent : shape) text += str(text.empty() ? "" : ", ", extent);
    return "[" + text + "]";
  };
  std::vector<float> parameters(static_cast<std::size_t>(adapter->layout.num_parameters));
  for (const auto& array : adapter->layout.arrays) {
    const AdapterTensor* tensor = file.find(array.module, array.suffix);
    require(tensor != nullptr, directory, ": no tensor ", peft_key(array),
            ", which this model has for its target_modules; is the adapter for another base model (",
            file.base_model.empty() ? "not named" : file.base_model, ")?");
    require(tensor->array.shape == array.shape, directory, ": ", peft_key(array), " is ",
            shape_text(tensor->array.shape), ", wanted ", shape_text(array.shape),
            "; is the adapter for another base model?");
    std::copy(tensor->values.begin(), tensor->values.end(), parameters.begin() + array.offset);
  }
  for (const auto& [array, values] : file.tensors)
    require(std::any_of(adapter->layout.arrays.begin(), adapter->layout.arrays.end(),
                        [&](const AdapterArray& known) { return known.module == array.module; }),
            directory, ": module ", array.module,
            " is not a linear of this model; is the adapter for another base model?");
  allocator_.upload(adapter->parameters(), parameters.data(), adapter->bytes());
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
  copy->layout = newest.layout;
  copy->bias_ = newest.bias_;
  copy->plain_lora_ = newest.plain_lora_;
  allocate(*copy);
  allocator_.copy(copy->parameters(), newest.parameters(), newest.bytes());
  return copy;
}

void AdapterStore::publish(std::shared_ptr<Adapter> adapter) {
  derive(*adapter, false);
  auto& newest = newest_[adapter->name];
  newest = std::move(adapter);
}

}  // namespace flexcore
