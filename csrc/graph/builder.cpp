#include "graph/builder.h"

#include <algorithm>
#include <map>
#include <utility>

#include "core/check.h"
#include "graph/linear_op.h"

namespace flexcore {

void GraphBuilder::begin_layer(int layer) {
  layer_ = layer;
  phase_ = Phase::kTrunk;
  graph_.num_layers = std::max(graph_.num_layers, layer + 1);
}

void GraphBuilder::begin_phase(Phase phase) {
  layer_ = kNoLayer;
  phase_ = phase;
}

ParamId GraphBuilder::param(const std::string& name, std::int64_t out_features, std::int64_t in_features,
                            bool quantizable) {
  const auto same =
      std::find_if(graph_.params.begin(), graph_.params.end(), [&](const GraphParam& p) { return p.name == name; });
  if (same != graph_.params.end()) {
    require<Error>(same->out_features == out_features && same->in_features == in_features, "parameter ", name,
                   " used with two shapes");
    same->quantizable = same->quantizable && quantizable;
    return static_cast<ParamId>(same - graph_.params.begin());
  }
  graph_.params.push_back({name, out_features, in_features, quantizable});
  return static_cast<ParamId>(graph_.params.size()) - 1;
}

ParamId GraphBuilder::matrix(const std::string& name, std::int64_t out_features, std::int64_t in_features) {
  return param(name, out_features, in_features, false);
}

ParamId GraphBuilder::vector(const std::string& name, std::int64_t size) { return param(name, size, 0, false); }

TensorId GraphBuilder::tensor(const std::string& name, std::int64_t width, DType dtype, RowSet rows) {
  return graph_.add_tensor({name, width, dtype, rows, layer_, kNoNode, dtype, false});
}

void GraphBuilder::node(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs,
                        std::vector<TensorId> outputs) {
  graph_.add_node({std::move(op), std::move(inputs), std::move(outputs), layer_, phase_});
}

TensorId GraphBuilder::embedding(const std::string& name, ParamId weight) {
  const auto& p = graph_.params[static_cast<std::size_t>(weight)];
  const TensorId y = tensor(name, p.in_features, DType::kFloat32, RowSet::kTokens);
  graph_.tensors[static_cast<std::size_t>(y)].keep_dtype = compute_;
  node(embedding_op(weight), {}, {y});
  graph_.embedding = y;
  embedding_weight_ = weight;
  return y;
}

TensorId GraphBuilder::rms_norm(const std::string& name, TensorId x, ParamId weight, float eps) {
  const auto& in = graph_.tensor(x);
  const std::int64_t group = graph_.params[static_cast<std::size_t>(weight)].out_features;
  const TensorId y = tensor(name, in.width, compute_, in.rows);
  node(rms_norm_op(weight, group, eps), {x}, {y});
  return y;
}

TensorId GraphBuilder::linear_node(TensorId x, TensorId residual, const LinearSpec& spec) {
  const std::int64_t in_features = graph_.tensor(x).width;
  const RowSet rows = graph_.tensor(x).rows;
  const ParamId weight = param(spec.path + ".weight", spec.out_features, in_features, true);
  const ParamId bias = spec.bias ? vector(spec.path + ".bias", spec.out_features) : kNoParam;
  const bool add = residual != kNoTensor;
  const TensorId y = tensor(spec.name, spec.out_features, add ? DType::kFloat32 : compute_, rows);
  if (add) graph_.tensors[static_cast<std::size_t>(y)].keep_dtype = compute_;
  std::vector<TensorId> inputs = {x};
  if (add) inputs.push_back(residual);
  node(std::make_shared<LinearOp>(std::vector<LinearOp::Member>{{weight, bias}}, add), std::move(inputs), {y});
  graph_.sites.push_back({spec.path, layer_, spec.out_features, in_features, spec.bias, add, false, weight});
  site_input_.push_back(x);
  return y;
}

TensorId GraphBuilder::linear(TensorId x, const LinearSpec& spec) { return linear_node(x, kNoTensor, spec); }

TensorId GraphBuilder::linear_residual(TensorId x, TensorId residual, const LinearSpec& spec) {
  return linear_node(x, residual, spec);
}

TensorId GraphBuilder::rotary(TensorId x, std::int64_t num_heads) {
  const auto in = graph_.tensor(x);
  const TensorId y = tensor(in.name + ".rotated", in.width, in.dtype, in.rows);
  node(rotary_op(num_heads, in.width / num_heads), {x}, {y});
  return y;
}

TensorId GraphBuilder::attention(const std::string& name, TensorId q, TensorId k, TensorId v,
                                 const AttentionShape& shape) {
  const TensorId y = tensor(name, shape.num_heads * shape.head_dim, compute_, RowSet::kTokens);
  const TensorId lse = tensor(name + ".lse", shape.num_heads, DType::kFloat32, RowSet::kTokens);
  node(attention_op(shape), {q, k, v}, {y, lse});
  graph_.tensors[static_cast<std::size_t>(lse)].keep_exact = true;  // it goes into an exponent
  for (const auto id : {k, v}) graph_.tensors[static_cast<std::size_t>(id)].in_pages = true;
  graph_.keys_values.emplace_back(k, v);
  graph_.num_heads = shape.num_heads, graph_.num_kv_heads = shape.num_kv_heads;
  return y;
}

TensorId GraphBuilder::silu_mul(const std::string& name, TensorId gate, TensorId up) {
  const auto in = graph_.tensor(gate);
  const TensorId y = tensor(name, in.width, in.dtype, in.rows);
  node(silu_mul_op(), {gate, up}, {y});
  return y;
}

void GraphBuilder::heads(TensorId hidden, ParamId norm, float eps, ParamId head) {
  graph_.hidden = hidden;
  using Place = LinearSite::Place;
  const auto add_site = [&](const char* path, ParamId weight, Place place) {
    const auto& p = graph_.params[static_cast<std::size_t>(weight)];
    graph_.sites.push_back({path, kNoLayer, p.out_features, p.in_features, false, false, false, weight, place});
  };
  add_site("model.embed_tokens", embedding_weight_, Place::kEmbedding);
  add_site("lm_head", head, Place::kOutput);
  const std::int64_t hidden_size = graph_.tensor(hidden).width;
  const std::int64_t vocab_size = graph_.params[static_cast<std::size_t>(head)].out_features;
  const auto normed_rows = [&](RowSet rows, const std::string& prefix) {
    const TensorId gathered = tensor(prefix + ".hidden", hidden_size, DType::kFloat32, rows);
    node(gather_op(rows), {hidden}, {gathered});
    return rms_norm(prefix + ".norm", gathered, norm, eps);
  };
  begin_phase(Phase::kSampleHead);
  const TensorId last = normed_rows(RowSet::kSampled, "sample");
  graph_.logits = tensor("logits", vocab_size, DType::kFloat32, RowSet::kSampled);
  node(std::make_shared<LinearOp>(std::vector<LinearOp::Member>{{head, kNoParam}}, false), {last}, {graph_.logits});
  begin_phase(Phase::kLossHead);
  const TensorId targets = normed_rows(RowSet::kTargets, "target");
  const TensorId grad = tensor("target.grad", hidden_size, DType::kFloat32, RowSet::kTargets);
  node(cross_entropy_op(head, graph_.site_at(Place::kOutput)), {targets}, {grad});
}

Graph GraphBuilder::take() {
  std::map<TensorId, int> readers;
  for (const auto& node : graph_.nodes)
    for (const auto input : node.inputs) ++readers[input];
  for (std::size_t i = 0; i < site_input_.size(); ++i) graph_.sites[i].sole_reader = readers.at(site_input_[i]) == 1;
  return std::move(graph_);
}

}  // namespace flexcore
