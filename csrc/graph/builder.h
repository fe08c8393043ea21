#pragma once

#include <memory>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "graph/layer_ops.h"

namespace flexcore {

/// Builds a model's forward graph. Tensors are named within the current layer; parameters by their name in the
/// checkpoint.
class GraphBuilder {
 public:
  /// `compute` is the dtype of weights and activations; the residual stream is float32.
  explicit GraphBuilder(DType compute) : compute_(compute) {}

  void begin_layer(int layer);
  void begin_phase(Phase phase);  // outside of layers

  ParamId matrix(const std::string& name, std::int64_t out_features, std::int64_t in_features);
  ParamId vector(const std::string& name, std::int64_t size);

  TensorId embedding(const std::string& name, ParamId weight);
  TensorId rms_norm(const std::string& name, TensorId x, ParamId weight, float eps);

  /// A linear of a decoder layer: a site for bypasses. `path` is the module's; its weight is `path`.weight.
  struct LinearSpec {
    std::string name;  // of the output
    std::string path;
    std::int64_t out_features = 0;
    bool bias = false;
  };
  TensorId linear(TensorId x, const LinearSpec& spec);
  /// residual + linear(x), in place; the output keeps the name given.
  TensorId linear_residual(TensorId x, TensorId residual, const LinearSpec& spec);

  TensorId rotary(TensorId x, std::int64_t num_heads);
  TensorId attention(const std::string& name, TensorId q, TensorId k, TensorId v, const AttentionShape& shape);
  TensorId silu_mul(const std::string& name, TensorId gate, TensorId up);

  /// Final norm and output layer, for sampling and for the loss; `head` is the output matrix.
  void heads(TensorId hidden, ParamId norm, float eps, ParamId head);

  Graph take();

 private:
  TensorId tensor(const std::string& name, std::int64_t width, DType dtype, RowSet rows);
  void node(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs, std::vector<TensorId> outputs);
  ParamId param(const std::string& name, std::int64_t out_features, std::int64_t in_features, bool quantizable);
  TensorId linear_node(TensorId x, TensorId residual, const LinearSpec& spec);

  Graph graph_;
  std::vector<TensorId> site_input_;  // by LinearSite
  ParamId embedding_weight_ = kNoParam;
  DType compute_;
  int layer_ = kNoLayer;
  Phase phase_ = Phase::kTrunk;
};

}  // namespace flexcore
