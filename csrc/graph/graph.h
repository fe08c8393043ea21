#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "graph/operator.h"

namespace flexcore {

/// One activation or gradient: a row for each token of a row set. The number of rows is symbolic until a program runs.
struct GraphTensor {
  std::string name;  // within its layer: "q", "gate", "grad.q"; in-place updates keep the name
  std::int64_t width = 0;
  DType dtype = DType::kFloat32;
  RowSet rows = RowSet::kTokens;
  int layer = kNoLayer;
  NodeId producer = kNoNode;
  DType keep_dtype = DType::kFloat32;  // when it is kept for a backward
  bool in_pages = false;               // also in the KV pages, so that no backward has to keep it
  bool keep_exact = false;             // not as codes, whatever the graph says
};

/// A frozen parameter that the weight store loads.
struct GraphParam {
  std::string name;  // as in the checkpoint
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;  // 0: a vector of out_features
  bool quantizable = false;      // read by linears of decoder layers alone
};

/// A linear that a bypass can be attached to: those of the layers first, then the embedding (the linear of a one-hot
/// row, so to say) and the output layer.
struct LinearSite {
  enum class Place : std::uint8_t { kLayer, kEmbedding, kOutput };
  std::string path;  // module path, for example "model.layers.0.self_attn.q_proj"
  int layer = kNoLayer;
  std::int64_t out_features = 0, in_features = 0;
  bool bias = false;
  bool residual = false;     // added to the residual stream
  bool sole_reader = false;  // of its input: that may be changed in place
  ParamId weight = kNoParam;
  Place place = Place::kLayer;
};

/// What is kept for a backward: everything that the layers' forward makes; of it, what the backward reads; of that,
/// what only a GEMM or attention makes; the same in 8-bit groups (ops/scatter.h).
enum class KeepMode : std::uint8_t { kAll, kRead, kLeast, kCodes };

/// When a node runs.
enum class Phase : std::uint8_t { kTrunk, kSampleHead, kLossHead, kBackward };

struct Node {
  std::shared_ptr<const Operator> op;
  std::vector<TensorId> inputs, outputs;
  int layer = kNoLayer;
  Phase phase = Phase::kTrunk;
};

/// Operators in execution order over tensors in single-assignment form. An in-place update makes a new tensor that
/// takes over its input's memory (Operator::alias).
class Graph {
 public:
  std::vector<GraphTensor> tensors;
  std::vector<Node> nodes;
  std::vector<GraphParam> params;
  std::vector<LinearSite> sites;
  int num_layers = 0;
  KeepMode keep_mode = KeepMode::kLeast;
  TensorId embedding = kNoTensor;                          // input of the first layer
  std::vector<std::pair<TensorId, TensorId>> keys_values;  // by layer, as attention writes them to its pages
  std::int64_t num_heads = 0, num_kv_heads = 0;
  TensorId hidden = kNoTensor;  // residual stream after the last layer
  TensorId logits = kNoTensor;  // [sampled rows, vocab_size]

  TensorId add_tensor(GraphTensor tensor);
  NodeId add_node(Node node);  // at the end; sets its outputs' producer
  const GraphTensor& tensor(TensorId id) const { return tensors[static_cast<std::size_t>(id)]; }
  /// How a backward's tensor is kept, and the bytes of a row.
  DType kept_dtype(const GraphTensor& tensor) const;
  std::size_t kept_bytes(const GraphTensor& tensor) const;
  std::int64_t num_parameters() const;
  std::span<const LinearSite> layer_sites() const;
  /// Of the one site of that place.
  SiteId site_at(LinearSite::Place place) const;
  /// The last tensor of that name in a layer: after every in-place update.
  TensorId find(int layer, std::string_view name) const;
};

}  // namespace flexcore
