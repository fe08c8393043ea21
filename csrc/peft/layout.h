#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/json_fields.h"
#include "flexcore/config.h"
#include "graph/bypass.h"
#include "graph/bypass_form.h"
#include "graph/graph.h"
#include "ops/lora.h"

namespace flexcore {

/// One trainable array of an adapter. Its name in PEFT's files is "base_model.model." + module + suffix, or, without a
/// module, the suffix.
struct AdapterArray {
  std::string module;  // path: "model.layers.0.self_attn.q_proj"; or ""
  std::string suffix;  // ".lora_A.weight"; "prompt_embeddings"
  std::vector<std::int64_t> shape;
  std::int64_t offset = 0;  // in floats from the start of the adapter's parameters
  std::int64_t size() const;
};
std::string peft_key(const AdapterArray& array);

/// Ids of `num_virtual_tokens` virtual tokens, -1, -2, ..., and then those given.
void with_virtual_tokens(std::span<const std::int32_t> token_ids, std::int64_t num_virtual_tokens,
                         std::vector<std::int32_t>& all);

/// What an adapter does at one linear. Offsets are in floats: of the arrays from the start of its parameters.
struct AdapterModule {
  Bypass bypass;
  LinearSite::Place place = LinearSite::Place::kLayer;
  std::string path;
  std::int64_t in_features = 0, out_features = 0;
  bool residual = false;  // of the linear
  std::int64_t rank = 0;  // of A and B; 0: it has none
  float scaling = 1.0f;
  Activation activation = Activation::kNone;
  bool drops = false;  // DoRA in training: elements of x
  std::int64_t a_offset = 0, b_offset = 0;
  std::int64_t scale_offset = 0;    // (IA)^3's vector, DoRA's magnitudes
  std::int64_t weight_offset = 0;   // of kOwnWeight
  std::int64_t derived_offset = 0;  // DoRA: norms and scales [2, out_features], in what is derived from the parameters
};

/// Where everything of an adapter is, and what it does; known without weights.
struct AdapterLayout {
  std::vector<AdapterModule> modules;  // by site
  std::vector<AdapterArray> arrays;    // one after the other
  std::int64_t num_parameters = 0;
  std::int64_t num_derived = 0;         // floats that follow from parameters and weights, made anew for every version
  std::int64_t num_virtual_tokens = 0;  // ahead of every sequence; the one array is then [num_virtual_tokens, width]

  BypassSet bypasses() const;
  /// The module at a site of the embedding or the output layer, which have at most one; null: none.
  const AdapterModule* find(SiteId site) const;
  /// The next array; returns its offset.
  std::int64_t add(const std::string& module, const char* suffix, std::vector<std::int64_t> shape);
};

// Each method is a file: what it does where, how its parameters begin, and PEFT's form of its configuration. Throws
// InvalidArgument or Unsupported that names the field, for what does not fit the linears too.

// lora.cpp: LoRA, rsLoRA, DoRA
AdapterLayout lay_out(const LoraConfig& config, const Graph& base);
void initialize(const LoraConfig& config, const AdapterLayout& layout, std::uint64_t seed, float* parameters);
Json::Object to_peft(const LoraConfig& config);
LoraConfig lora_from_peft(const JsonFields& fields);
// ia3.cpp
AdapterLayout lay_out(const IA3Config& config, const Graph& base);
void initialize(const IA3Config& config, const AdapterLayout& layout, std::uint64_t seed, float* parameters);
Json::Object to_peft(const IA3Config& config);
IA3Config ia3_from_peft(const JsonFields& fields);
// bottleneck.cpp
AdapterLayout lay_out(const BottleneckConfig& config, const Graph& base);
void initialize(const BottleneckConfig& config, const AdapterLayout& layout, std::uint64_t seed, float* parameters);
Json::Object to_peft(const BottleneckConfig& config);
BottleneckConfig bottleneck_from_peft(const JsonFields& fields);

// virtual_tokens.cpp
AdapterLayout lay_out(const PromptTuningConfig& config, const Graph& base);
AdapterLayout lay_out(const PrefixTuningConfig& config, const Graph& base);
void initialize(const PromptTuningConfig& config, const AdapterLayout& layout, std::uint64_t seed, float* parameters);
void initialize(const PrefixTuningConfig& config, const AdapterLayout& layout, std::uint64_t seed, float* parameters);
PromptTuningConfig prompt_tuning_from_peft(const JsonFields& fields);
PrefixTuningConfig prefix_tuning_from_peft(const JsonFields& fields);
Json::Object to_peft(const PromptTuningConfig& config);
Json::Object to_peft(const PrefixTuningConfig& config);

/// Modules of their own, whole: those of the embedding and the output layer that `modules_to_save` names, as PEFT's
/// option of that name. Throws Unsupported for other modules, InvalidArgument for one that has a bypass already.
void add_own_modules(AdapterLayout& layout, const std::vector<std::string>& modules_to_save, const Graph& base);

/// `base`: a model's graph without bypasses.
AdapterLayout lay_out(const AdapterConfig& config, const Graph& base);
std::string peft_type(const AdapterConfig& config);  // "LORA", "IA3", "BOTTLENECK", "PROMPT_TUNING", "PREFIX_TUNING"
/// With what a configuration says of the model, which is checked where it is there already.
AdapterConfig completed(AdapterConfig config, const Graph& base);

/// A module as steps, for planning over several ranks. Throws Unsupported for DoRA and virtual tokens, whose parts are
/// not all between two tensors.
BypassForm form_of(const AdapterModule& module);
/// y += B (A x).
BypassForm lora_form(std::int64_t in_features, std::int64_t out_features, std::int64_t rank);

/// A PEFT list of names, or a string: a regular expression, or "all-linear" in any case.
struct ModuleNames {
  std::vector<std::string> names;
  bool is_regex = false;
};
ModuleNames names_from_peft(const JsonFields& fields, const char* option);
std::vector<std::string> paths_of(std::span<const LinearSite> sites);

}  // namespace flexcore
