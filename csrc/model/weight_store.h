#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "memory/buffer.h"
#include "memory/tier.h"
#include "model/safetensors.h"
#include "ops/context.h"
#include "ops/weight.h"

namespace flexcore {

/// A tensor that a graph wants of a checkpoint, under the checkpoint's name. Asking twice for one tensor (tied
/// embeddings) stores it once.
struct WeightSpec {
  std::string name;
  std::int64_t out_features = 0;  // rows; of a vector its size
  std::int64_t in_features = 0;   // 0: a vector (norm weight, bias), kept in float32
  bool quantizable = false;       // may be stored in the format of the store; not if somebody asks for it as dense
};

/// The one copy of a model's weights: matrices as the backend's GEMMs want them, vectors in float32, all in one buffer.
class WeightStore {
 public:
  /// `dtype` of the matrices: float32 or bfloat16; `format` of those that are quantizable. The references must outlive
  /// the store.
  WeightStore(OpContext& context, Allocator& allocator, MemoryLedger& ledger, DType dtype, WeightFormat format = {});

  /// Bytes that `load` will take.
  static std::size_t planned_bytes(OpContext& context, std::span<const WeightSpec> specs, DType dtype,
                                   WeightFormat format = {});

  /// Replaces the contents. Every tensor must be there, in the shape asked for, in float32, bfloat16 or float16, and
  /// finite; otherwise ModelLoadError (Unsupported for other dtypes) names file and tensor, and the store is as before.
  /// Pages of the checkpoint are given back as they have been read and quantised. Throws OutOfMemory.
  void load(const SafetensorsModel& model, std::span<const WeightSpec> specs);

  // Throw InvalidArgument for names that were not asked for, or as the other kind.
  WeightView matrix(std::string_view name) const;
  TensorView vector(std::string_view name) const;  // [size] float32

  std::size_t bytes() const { return buffer_.bytes(); }

 private:
  struct Entry {
    WeightSpec spec;
    Tier tier = Tier::kDevice;
    std::size_t offset = 0;  // into the buffer
  };
  struct Table {
    std::vector<Entry> entries;
    std::unordered_map<std::string_view, std::size_t> by_name;  // keys live in entries
    std::size_t bytes = 0;
  };

  static Table make_table(OpContext& context, std::span<const WeightSpec> specs, DType dtype, WeightFormat format);
  const Entry& find(std::string_view name, bool matrix) const;
  WeightFormat format_of(const WeightSpec& spec) const { return spec.quantizable ? format_ : WeightFormat{}; }
  void check_finite(const SafetensorsModel& model, const SafetensorsModel::Entry& source, const WeightSpec& spec) const;
  void fill(const SafetensorsModel& model, const SafetensorsModel::Entry& source, const Entry& entry,
            std::byte* out) const;

  OpContext& context_;
  Allocator& allocator_;
  MemoryLedger& ledger_;
  DType dtype_;
  WeightFormat format_;
  Table table_;
  Buffer buffer_;
};

}  // namespace flexcore
