#pragma once

#include <compare>
#include <cstdint>
#include <set>
#include <vector>

#include "ops/dropout.h"
#include "ops/lora.h"
#include "ops/scale.h"
#include "ops/weight.h"

namespace flexcore {

using SiteId = std::int32_t;

/// How a bypass network joins a linear y = x W^T + bias [+ residual]. What the linear makes before the residual is its
/// product.
enum class BypassKind : std::uint8_t {
  kLora,         // y += scaling * act(x A^T) B^T: LoRA; with an activation, a parallel bottleneck adapter
  kDora,         // product = bias + scale * (x W^T + scaling * (x A^T) B^T)
  kOutputScale,  // product *= scale: (IA)^3
  kInputScale,   // x *= scale: (IA)^3 of feedforward modules
  kSeries,       // product += scaling * act(product A^T) B^T: a bottleneck adapter
  kOwnWeight,    // y = x W'^T, or W'[token] at the embedding: a module of its own (modules_to_save)
  // Beside kDora, in training alone:
  kDropped,  // the product is of x without what is dropped; that of the rest joins it unscaled
  // And, elsewhere, of virtual tokens:
  kPrompt,  // their embeddings
  kPrefix,  // their keys and values in one layer
};

struct Bypass {
  SiteId site = 0;  // kPrompt: 0; kPrefix: the layer
  BypassKind kind = BypassKind::kLora;
  auto operator<=>(const Bypass&) const = default;
};
using BypassSet = std::set<Bypass>;

/// Dropout of the rows of one LoRA segment, in finetuning.
struct SegmentDropout {
  DropoutMask mask;           // p 0: none
  std::int64_t position = 0;  // of the segment's first row in its sequence
};

/// Rows whose product is of x without what is dropped.
struct DroppedSegment {
  std::int64_t begin = 0, end = 0;
  SegmentDropout dropout;
};

/// Rows of a batch that are virtual tokens.
struct VirtualRows {
  std::int64_t begin = 0, end = 0;
  TensorView prompt;  // [rows, hidden_size] float32: their embeddings; or empty
  TensorView
      prefix;       // [rows, 2 * num_layers * kv_width] float32: by layer a key, already rotated, and a value; or empty
  TensorView grad;  // like the one that there is; backward only, += always
};

/// Rows of a batch that take a weight of their adapter's own in place of the base model's.
struct OwnWeightSegment {
  std::int64_t begin = 0, end = 0;
  WeightView weight;             // [out_features, in_features]
  float* grad_weight = nullptr;  // the same, backward only; += always; null: not wanted
};

/// The rows of a batch that have a bypass at one site, by what it does; each list in ascending disjoint rows.
struct SiteSegments {
  std::vector<LoraSegment> lora;                // added to y
  std::vector<SegmentDropout> dropout;          // of those, or empty
  std::vector<DroppedSegment> dropped;          // of those with a scale
  std::vector<LoraSegment> product_lora;        // added to the product
  std::vector<SegmentDropout> product_dropout;  // of those, or empty
  std::vector<ScaleSegment> output_scale;       // of the product, after product_lora
  std::vector<LoraSegment> series;              // of the product, after the scale
  std::vector<ScaleSegment> input_scale;        // of x
  std::vector<OwnWeightSegment> own;            // instead of y
  std::int64_t num_tokens = 0;                  // of the embedding's table: its in_features

  bool empty() const { return lora.empty() && input_scale.empty() && own.empty() && !separated(); }
  void clear() {
    lora.clear(), dropout.clear(), dropped.clear(), product_lora.clear(), product_dropout.clear();
    output_scale.clear(), series.clear(), input_scale.clear(), own.clear();
  }
  /// Something is done to the product, so that it has to be made before the residual is added.
  bool separated() const { return !product_lora.empty() || !output_scale.empty() || !series.empty(); }
};

}  // namespace flexcore
