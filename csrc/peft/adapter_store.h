#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flexcore/config.h"
#include "graph/graph.h"
#include "memory/buffer.h"
#include "model/weight_store.h"
#include "peft/layout.h"
#include "peft/peft_files.h"

namespace flexcore {

/// One version of an adapter. Requests hold the version that they began with; training makes a new one.
class Adapter {
 public:
  std::string name;
  std::uint64_t uid = 0;  // of the name's loading; versions share it
  std::int64_t version = 0;
  AdapterConfig config;
  AdapterLayout layout;

  float* parameters() const { return reinterpret_cast<float*>(params_.data()); }  // on the device
  std::vector<float> download() const;                                            // the same on the host
  std::size_t bytes() const { return params_.bytes(); }
  /// Key under which prefixes computed with this version may be shared.
  std::uint64_t cache_key() const { return (uid << 32) | static_cast<std::uint64_t>(version); }
  /// That finetuning drops an element of a LoRA's input.
  double dropout() const;
  /// LoRA and nothing else: what recorded batches may hold.
  bool plain_lora() const { return plain_lora_; }
  /// Rows [begin, end) of a batch through `module`; gradients, if wanted, at the arrays' offsets from `gradients`.
  /// `dropout` null: none.
  void add_rows(const AdapterModule& module, std::int64_t begin, std::int64_t end, float* gradients,
                const SegmentDropout* dropout, SiteSegments& site) const;
  /// Those of a batch's rows [begin, end), which are at `position` and behind it in a sequence, that are virtual
  /// tokens, if some are; gradients as above.
  std::optional<VirtualRows> virtual_rows(std::int64_t position, std::int64_t begin, std::int64_t end,
                                          float* gradients) const;
  LoraSegment lora_segment(const AdapterModule& module, std::int64_t begin, std::int64_t end,
                           float* gradients = nullptr) const;

 private:
  friend class AdapterStore;
  float* derived() const { return reinterpret_cast<float*>(derived_.data()); }
  Buffer params_, derived_;
  std::vector<WeightView> own_weights_;  // by module: kOwnWeight's, packed; of others empty
  Buffer own_;                           // these
  std::vector<const float*> bias_;       // by module: of a DoRA linear; null: none
  bool plain_lora_ = true;
};

/// Adapters by name, newest version each.
class AdapterStore {
 public:
  /// `weights`: loaded by the time that an adapter is made. References must outlive the store.
  /// `base`: the model's graph without bypasses.
  AdapterStore(const Graph& base, OpContext& context, const WeightStore& weights, Allocator& allocator,
               MemoryLedger& ledger);

  /// A new adapter changes nothing. The name is not in use.
  std::shared_ptr<Adapter> create(const std::string& name, const AdapterConfig& config, std::uint64_t seed);
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
  /// Makes it the newest version of its name, with what follows from its parameters as they are now.
  void publish(std::shared_ptr<Adapter> adapter);

 private:
  void require_free(const std::string& name) const;
  std::shared_ptr<Adapter> place(const std::string& name, const AdapterConfig& config, AdapterLayout layout);
  void allocate(Adapter& adapter) const;
  void look_up(const std::vector<std::int32_t>& ids, const WeightView& table, float* rows) const;
  WeightView base_weight(const AdapterModule& module) const;
  void copy_modules(Adapter& adapter) const;
  void pack_modules(Adapter& adapter) const;
  void embed(Adapter& adapter, const std::vector<std::int32_t>& token_ids) const;
  void derive(Adapter& adapter, bool magnitudes_are_norms) const;

  const Graph& base_;
  OpContext& context_;
  const WeightStore& weights_;
  Allocator& allocator_;
  MemoryLedger& ledger_;
  std::map<std::string, std::shared_ptr<Adapter>> newest_;
  std::uint64_t next_uid_ = 1;
};

/// Bytes of an adapter's modules of their own as products read them, beside its parameters.
std::size_t own_module_bytes(OpContext& context, const AdapterLayout& layout, DType dtype);

/// Values laid out as the adapter's parameters, as PEFT's files hold them.
std::vector<AdapterTensor> adapter_tensors(const Adapter& adapter, const float* values);

}  // namespace flexcore
