#include "peft/attach.h"

#include <map>
#include <string>
#include <utility>

#include "core/check.h"
#include "graph/bypass_ops.h"
#include "graph/embedding_bypass.h"
#include "graph/layer_ops.h"
#include "graph/linear_op.h"

namespace flexcore {

namespace {

class Attacher {
 public:
  /// `bypasses` null: all, for serving.
  Attacher(Graph& graph, const BypassSet* bypasses)
      : graph_(graph), bypasses_(bypasses), current_(graph.tensors.size()) {
    for (std::size_t i = 0; i < current_.size(); ++i) current_[i] = static_cast<TensorId>(i);
    for (std::size_t i = 0; i < graph.sites.size(); ++i)
      if (graph.sites[i].place != Place::kEmbedding) site_of_weight_[graph.sites[i].weight] = static_cast<SiteId>(i);
  }

  void run() {
    for (auto& node : std::exchange(graph_.nodes, {})) {
      layer_ = node.layer, phase_ = node.phase;
      attach_prefix(node);
      for (auto& input : node.inputs) input = newest(input);
      const auto linear = std::dynamic_pointer_cast<const LinearOp>(node.op);
      const auto site = linear == nullptr || linear->members().size() != 1
                            ? site_of_weight_.end()
                            : site_of_weight_.find(linear->members()[0].weight);
      if (site == site_of_weight_.end())
        graph_.add_node(std::move(node));
      else
        attach(site->second, *linear, std::move(node));
      attach_to_embedding();
    }
    graph_.hidden = newest(graph_.hidden);
    graph_.logits = newest(graph_.logits);
  }

 private:
  using Place = LinearSite::Place;

  bool serving() const { return bypasses_ == nullptr; }
  bool has(BypassKind kind) const { return has(kind, site_); }
  bool has(BypassKind kind, SiteId site) const {
    if (!serving()) return bypasses_->contains({site, kind});
    const LinearSite& linear = graph_.sites[static_cast<std::size_t>(site)];
    if (kind == BypassKind::kOwnWeight) return linear.place != Place::kLayer;
    if (linear.place == Place::kOutput) return kind == BypassKind::kLora;
    return kind != BypassKind::kInputScale || linear.sole_reader;
  }
  TensorId newest(TensorId tensor) const { return tensor < 0 ? tensor : current_[static_cast<std::size_t>(tensor)]; }

  TensorId add(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs, TensorId like,
               const std::string& name) {
    GraphTensor made = graph_.tensor(like);
    if (!name.empty()) made.name = name;
    const TensorId output = graph_.add_tensor(std::move(made));
    graph_.add_node({std::move(op), std::move(inputs), {output}, layer_, phase_});
    return output;
  }
  /// In place. With a name the tensor is another one from then on, and the pages hold that.
  TensorId update(std::shared_ptr<const Operator> op, std::vector<TensorId> inputs, TensorId before,
                  const std::string& name = {}) {
    const TensorId after = add(std::move(op), std::move(inputs), before, name);
    if (!name.empty()) graph_.tensors[static_cast<std::size_t>(before)].in_pages = false;
    return after;
  }
  TensorId lora(BypassKind kind, TensorId x, TensorId y, const std::string& name = {}) {
    return update(std::make_shared<LoraOp>(std::vector<SiteId>{site_}, kind), {x, y}, y, name);
  }
  TensorId dropped(const LinearOp& linear, TensorId x, TensorId y, bool undo = false) {
    if (!has(BypassKind::kDropped)) return y;
    return update(dropped_linear_op(site_, linear.members()[0].weight, undo), {x, y}, y);
  }
  // What the linear makes, or its product where there is a residual; behind LoRA's part of it, so that those of one
  // input stay next to each other. DoRA scales the product of x without what is dropped; as in PEFT, what that leaves
  // of the product joins it as it is.
  TensorId scale_and_adapt(const LinearOp& linear, TensorId x, TensorId product) {
    const std::string name = graph_.tensor(product).name;
    product = dropped(linear, x, product);
    if (has(BypassKind::kOutputScale) || has(BypassKind::kDora)) {
      product = update(scale_op(site_, BypassKind::kOutputScale), {product}, product, name + ".scaled");
      product = dropped(linear, x, product, true);
    }
    if (has(BypassKind::kSeries)) product = lora(BypassKind::kSeries, product, product, name + ".adapted");
    return product;
  }

  // Once the embeddings are there.
  void attach_to_embedding() {
    if (graph_.nodes.back().outputs != std::vector<TensorId>{graph_.embedding}) return;
    const SiteId site = graph_.site_at(Place::kEmbedding);
    TensorId x = graph_.embedding;
    if (has(BypassKind::kLora, site) || has(BypassKind::kOwnWeight, site))
      x = update(embedding_bypass_op(site), {x}, x);
    if (has(BypassKind::kPrompt, 0)) x = update(prompt_op(), {x}, x);
    current_[static_cast<std::size_t>(graph_.embedding)] = x;
  }
  // Ahead of the layer's attention.
  void attach_prefix(const Node& node) {
    if (node.layer == kNoLayer || node.inputs.size() < 3 || !has(BypassKind::kPrefix, node.layer)) return;
    const auto [k, v] = graph_.keys_values[static_cast<std::size_t>(node.layer)];
    if (node.inputs[1] != k || node.inputs[2] != v) return;
    std::vector<TensorId> inputs = {newest(k), newest(v)}, outputs;
    for (const auto input : inputs) {
      GraphTensor made = graph_.tensor(input);
      made.name = graph_.tensor(input == inputs[0] ? k : v).name + ".prefixed";  // whatever else joined it
      graph_.tensors[static_cast<std::size_t>(input)].in_pages = false;
      outputs.push_back(graph_.add_tensor(std::move(made)));
    }
    graph_.add_node({prefix_op(), std::move(inputs), outputs, layer_, phase_});
    current_[static_cast<std::size_t>(k)] = outputs[0];
    current_[static_cast<std::size_t>(v)] = outputs[1];
  }

  void attach(SiteId site, const LinearOp& linear, Node node) {
    site_ = site;
    TensorId& x = node.inputs[0];
    if (has(BypassKind::kInputScale)) {
      require<Unsupported>(graph_.sites[static_cast<std::size_t>(site)].sole_reader, "input scale of ",
                           graph_.sites[static_cast<std::size_t>(site)].path,
                           ": other linears read the same input, wanted one that alone reads it");
      x = update(scale_op(site, BypassKind::kInputScale), {x}, x, graph_.tensor(x).name + ".scaled");
    }
    const TensorId y = node.outputs[0];
    current_[static_cast<std::size_t>(y)] = linear.residual() ? attach_residual(linear, std::move(node)) : [&] {
      const TensorId input = x;
      graph_.add_node(std::move(node));
      if (graph_.sites[static_cast<std::size_t>(site)].place == Place::kOutput) return attach_to_output(input, y);
      const bool any = has(BypassKind::kLora) || has(BypassKind::kDora);
      return scale_and_adapt(linear, input, any ? lora(BypassKind::kLora, input, y) : y);
    }();
  }

  // Of the logits to sample from; those of the loss are in its operator.
  TensorId attach_to_output(TensorId x, TensorId y) {
    if (has(BypassKind::kOwnWeight)) y = update(own_output_op(site_), {y, x}, y);
    return has(BypassKind::kLora) ? lora(BypassKind::kLora, x, y) : y;
  }

  // The fused linear, or the product apart where something is done to it; for serving both, of which a batch takes one.
  TensorId attach_residual(const LinearOp& linear, Node node) {
    const TensorId x = node.inputs[0], residual = node.inputs[1], y = node.outputs[0];
    const bool separate = has(BypassKind::kDora) || has(BypassKind::kOutputScale) || has(BypassKind::kSeries);
    TensorId last = y;
    if (!separate) {
      graph_.add_node(std::move(node));
    } else {
      const When when = serving() ? When::kSeparated : When::kAlways;
      if (serving()) {
        node.op = std::make_shared<LinearOp>(linear.members(), true, When::kFused, site_);
        graph_.add_node(std::move(node));
      }
      TensorId product = add(std::make_shared<LinearOp>(linear.members(), false, when, site_), {x}, y,
                             graph_.tensor(y).name + ".product");
      if (has(BypassKind::kDora)) product = lora(BypassKind::kDora, x, product);
      product = scale_and_adapt(linear, x, product);
      if (serving())
        last = update(add_op(when, site_), {y, product}, y);
      else
        graph_.add_node({add_op(when, site_), {residual, product}, {y}, layer_, phase_});
    }
    return has(BypassKind::kLora) ? lora(BypassKind::kLora, x, last) : last;
  }

  Graph& graph_;
  const BypassSet* bypasses_;
  std::vector<TensorId> current_;  // newest version of each tensor
  std::map<ParamId, SiteId> site_of_weight_;
  SiteId site_ = 0;
  int layer_ = kNoLayer;
  Phase phase_ = Phase::kTrunk;
};

}  // namespace

void attach_bypasses(Graph& graph, const BypassSet* bypasses) {
  if (bypasses != nullptr)
    for (const auto& [site, kind] : *bypasses)
      require(site >= 0 && static_cast<std::size_t>(site) < graph.sites.size(), "attach_bypasses: site ", site, " of ",
              graph.sites.size());
  Attacher(graph, bypasses).run();
}

}  // namespace flexcore
