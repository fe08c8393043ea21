#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "flexcore/config.h"
#include "flexcore/engine.h"
#include "graph/graph.h"
#include "memory/buffer.h"
#include "ops/lora.h"
#include "peft/lora_matcher.h"
#include "peft/peft_files.h"

namespace flexcore {

/// One LoRA pair of an adapter. Offsets are in floats from the start of its parameters.
struct LoraModule {
  SiteId site = 0;
  std::int64_t rank = 0;
  float scaling = 1.0f;
  std::int64_t in_features = 0, out_features = 0;
  std::int64_t a_offset = 0, b_offset = 0;
  std::string path;
};

/// One version of an adapter. Requests hold the version that they began with; training makes a new one.
class Adapter {
 public:
  std::string name;
  std::uint64_t uid = 0;  // of the name's loading; versions share it
  std::int64_t version = 0;
  LoraConfig config;
  std::vector<LoraModule> modules;  // by site
  std::int64_t num_parameters = 0;
  double lora_dropout = 0.0;  // of the files it came from; training with it is refused

  float* parameters() const { return reinterpret_cast<float*>(params_.data()); }  // on the device
  std::vector<float> download() const;                                            // the same on the host
  std::size_t bytes() const { return params_.bytes(); }
  /// Key under which prefixes computed with this version may be shared.
  std::uint64_t cache_key() const { return (uid << 32) | static_cast<std::uint64_t>(version); }
  std::set<SiteId> sites() const;
  /// Rows [begin, end) of a batch through `module`; gradients, if wanted, at the same offsets from `gradients`.
  LoraSegment segment(const LoraModule& module, std::int64_t begin, std::int64_t end, float* gradients = nullptr) const;

 private:
  friend class AdapterStore;
  Buffer params_;
};

/// The modules that `config` puts at `sites`, site by site, parameters one after the other.
std::vector<LoraModule> lora_modules(const LoraMatcher& matcher, const std::vector<LinearSite>& sites);
std::int64_t num_parameters(const std::vector<LoraModule>& modules);
/// LoraMatcher::require_targets for the linears of a model.
void require_targets(const LoraMatcher& matcher, const std::vector<LinearSite>& sites);

/// Adapters by name, newest version each.
class AdapterStore {
 public:
  AdapterStore(const std::vector<LinearSite>& sites, Allocator& allocator, MemoryLedger& ledger);

  /// A ~ U(-1/sqrt(in), 1/sqrt(in)) (PEFT's default, kaiming with a = sqrt(5)), B = 0. The name is not in use.
  std::shared_ptr<Adapter> create(const std::string& name, const LoraConfig& config, std::uint64_t seed);
  /// From PEFT's files, under a name that is not in use.
  std::shared_ptr<Adapter> load(const std::string& name, const std::string& directory);
  /// As load, but nothing here knows of it until it is published.
  std::shared_ptr<Adapter> read(const std::string& name, const std::string& directory);
  void remove(const std::string& name);

  bool contains(const std::string& name) const { return newest_.contains(name); }
  /// Newest version. Throws InvalidArgument that lists the names there are.
  std::shared_ptr<Adapter> get(const std::string& name) const;
  std::vector<std::shared_ptr<Adapter>> all() const;

  /// A copy with the next version number, to be changed and then published. Until then, and if it never is, the newest
  /// version is as it was.
  std::shared_ptr<Adapter> next_version(const Adapter& newest) const;
  /// Makes it the newest version of its name.
  void publish(std::shared_ptr<Adapter> adapter);

 private:
  void require_free(const std::string& name) const;
  std::shared_ptr<Adapter> layout(const std::string& name, const LoraConfig& config, const LoraMatcher& matcher);

  const std::vector<LinearSite>& sites_;
  Allocator& allocator_;
  MemoryLedger& ledger_;
  std::map<std::string, std::shared_ptr<Adapter>> newest_;
  std::uint64_t next_uid_ = 1;
};

/// PEFT's parameter name: "base_model.model.<path>.lora_A.weight".
std::string peft_key(const LoraModule& module, bool is_a);

/// Arrays laid out as the adapter's parameters, as PEFT's files hold them.
std::vector<LoraWeights> lora_weights(const Adapter& adapter, const float* arrays);

}  // namespace flexcore
