#include "compile/parallel_backbone.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "core/check.h"
#include "graph/bypass_ops.h"
#include "graph/linear_op.h"

namespace flexcore {

namespace {

// What a tensor's readers ask of how its features are split.
struct Demand {
  std::int64_t unit = 1;    // features that stay together
  bool replicable = false;  // readers can take their part of a copy
};

class Pass {
 public:
  Pass(const Graph& graph, const BackboneOptions& options)
      : graph_(graph), residual_(options.split_residual ? kRowSplit : kReplicated) {
    plan_.ranks = options.ranks;
    plan_.split_residual = options.split_residual;
    plan_.tensors.resize(graph.tensors.size());
    demands_.resize(graph.tensors.size());
    params_.resize(graph.params.size());
  }

  ParallelBackbone run() {
    for (auto i = graph_.nodes.size(); i-- > 0;) demand(graph_.nodes[i]);
    for (const auto& node : graph_.nodes) forward(node);
    for (auto i = graph_.nodes.size(); i-- > 0;) backward(graph_.nodes[i]);
    for (const auto& state : params_) plan_.params.push_back(state.value_or(kReplicated));
    return std::move(plan_);
  }

 private:
  ParallelTensor& at(TensorId id) { return plan_.tensors[static_cast<std::size_t>(id)]; }
  Demand& demand_of(TensorId id) { return demands_[static_cast<std::size_t>(id)]; }
  static bool is(const Node& node, std::string_view name) { return node.op->name() == name; }
  static const LinearOp* linear_of(const Node& node) { return dynamic_cast<const LinearOp*>(node.op.get()); }
  static const LoraOp* lora_of(const Node& node) { return dynamic_cast<const LoraOp*>(node.op.get()); }
  bool whole_row(const Node& node) const {
    const auto features = node.op->coupling().features;
    return features == Coupling::kWholeRow || features == graph_.tensor(node.inputs.at(0)).width;
  }

  void demand(const Node& node) {
    if (linear_of(node)) return;
    if (lora_of(node)) {
      for (std::size_t i = 0; i < node.outputs.size(); ++i) demand_of(node.inputs[i + 1]) = demand_of(node.outputs[i]);
      return;
    }
    const std::int64_t features = std::max<std::int64_t>(node.op->coupling().features, 1);
    for (std::size_t i = 0; i < node.inputs.size(); ++i) {
      Demand& wanted = demand_of(node.inputs[i]);
      const Demand& next = demand_of(node.outputs[0]);
      const bool attention = is(node, "attention");
      wanted.unit = std::lcm(wanted.unit, attention ? features : std::lcm(features, next.unit));
      wanted.replicable = attention ? i > 0 : next.replicable;
    }
  }

  void set_param(ParamId id, ParallelState state) {
    auto& known = params_[static_cast<std::size_t>(id)];
    require<Error>(!known || *known == state, "tensor parallel: ", graph_.params[static_cast<std::size_t>(id)].name,
                   " is wanted in two states");
    known = state;
  }

  void forward(const Node& node) {
    if (const auto* linear = linear_of(node)) return forward_linear(node, *linear);
    if (lora_of(node)) {
      for (std::size_t i = 0; i < node.outputs.size(); ++i) {
        const ParallelState state = at(node.inputs[i + 1]).used;
        at(node.outputs[i]) = {state, state};
      }
      return;
    }
    if (is(node, "embedding")) {  // every rank looks up the tokens of its vocabulary
      set_param(node.op->params()[0], kOutSplit);
      at(node.outputs[0]) = {kPending, residual_};
      return;
    }
    if (is(node, "linear_cross_entropy")) {
      require<Error>(at(node.inputs[0]).used == kReplicated, "tensor parallel: the loss reads a tensor that is split");
      set_param(node.op->params()[0], kOutSplit);
      at(node.outputs[0]) = {kPending, kPending};  // softmax W, over the rank's vocabulary
      return;
    }
    for (const auto param : node.op->params()) set_param(param, kReplicated);
    const ParallelState x = at(node.inputs[0]).used;
    ParallelState made = x, used = x;
    if (is(node, "gather_rows")) {  // rows that another rank has are zero here
      if (x == kRowSplit) made = kPending;
      used = kReplicated;
    } else if (is(node, "attention")) {
      for (const auto input : node.inputs) {
        const ParallelState state = at(input).used;
        require<Error>(state == x || (input != node.inputs[0] && state == kReplicated),
                       "tensor parallel: attention of ", tensor_text(x), " queries and ", tensor_text(state),
                       " keys or values");
      }
    } else {
      for (const auto input : node.inputs) require_divided(node, input, x);
      // Linears, and through them attention, read whole hidden states.
      if (x == kRowSplit && whole_row(node)) used = kReplicated;
    }
    for (const auto output : node.outputs) at(output) = {made, used};
  }

  // That a node's operator can work on what a rank has of its input.
  void require_divided(const Node& node, TensorId input, ParallelState state) {
    const Coupling coupling = node.op->coupling();
    const std::int64_t width = graph_.tensor(input).width;
    const bool legal = at(input).used == state && state != kPending && !(state == kRowSplit && coupling.rows) &&
                       !(state == kFeatureSplit &&
                         (coupling.features == Coupling::kWholeRow || width % (coupling.features * plan_.ranks) != 0));
    require<Unsupported>(legal, "tensor parallel: no rule for ", node.op->name(), " of ", graph_.tensor(input).name,
                         " in state ", tensor_text(at(input).used));
  }

  ParallelState column_state(const LinearOp::Member& member, TensorId output) {
    const Demand& wanted = demand_of(output);
    const auto& weight = graph_.params[static_cast<std::size_t>(member.weight)];
    const std::int64_t units = weight.out_features / wanted.unit;
    if (output == graph_.logits || units % plan_.ranks == 0) return kOutSplit;
    require<Unsupported>(wanted.replicable, "tensor_parallel_size: ", plan_.ranks, " does not divide the ", units,
                         wanted.unit > 1 ? " heads" : " features", " that ", weight.name, " makes");
    return kReplicated;
  }

  void forward_linear(const Node& node, const LinearOp& linear) {
    const ParallelState x = at(node.inputs[0]).used;
    for (std::size_t i = 0; i < node.outputs.size(); ++i) {
      const auto& member = linear.members()[i];
      const bool columns = x == kReplicated;
      const ParallelState weight = columns ? column_state(member, node.outputs[i]) : kInSplit;
      const auto made = LinearRule::y(x, weight);
      require<Error>(made.has_value(), "tensor parallel: linear of a tensor in state ", tensor_text(x));
      set_param(member.weight, weight);
      if (member.bias != kNoParam) set_param(member.bias, weight == kOutSplit ? kFeatureSplit : kReplicated);
      ParallelState used = *made;
      if (linear.residual())
        used = at(node.inputs[1]).used;
      else if (*made == kPending || node.outputs[i] == graph_.logits)
        used = kReplicated;
      at(node.outputs[i]) = {*made, used};
    }
  }

  void contribute(TensorId id, std::optional<ParallelState> state) {
    require<Error>(state.has_value(), "tensor parallel: no rule for the gradient of ", graph_.tensor(id).name);
    auto& known = at(id).grad_made;
    if (!known || *known == *state) {
      known = state;
      return;
    }
    // Copies join a sum as rank 0's summand.
    const auto joins = [](ParallelState a, ParallelState b) { return a == kPending && b == kReplicated; };
    require<Error>(joins(*known, *state) || joins(*state, *known), "tensor parallel: gradients of ",
                   graph_.tensor(id).name, " in states ", tensor_text(*known), " and ", tensor_text(*state));
    known = kPending;
  }

  void backward(const Node& node) {
    if (is(node, "linear_cross_entropy")) {
      contribute(node.inputs[0], at(node.outputs[0]).made);
      return;
    }
    if (!at(node.outputs[0]).grad_made) return;
    if (is(node, "embedding")) {  // frozen: the gradient ends here, and nothing is moved for it
      at(node.outputs[0]).grad_used = at(node.outputs[0]).grad_made;
      return;
    }
    const auto* linear = linear_of(node);
    for (const auto output : node.outputs) {
      auto& tensor = at(output);
      if (!tensor.grad_made) continue;
      // A norm wants its sum taken: whatever is added to the residual's gradient is not a summand. So does a linear
      // that is split over in. What is linear in the gradient, and else reads copies, leaves it a sum.
      const bool whole = linear ? tensor.made == kPending : is(node, "rms_norm") && whole_row(node);
      tensor.grad_used = whole ? gradient_state(tensor.made) : *tensor.grad_made;
    }
    if (linear) {
      for (std::size_t i = 0; i < node.outputs.size(); ++i)
        if (const auto grad = at(node.outputs[i]).grad_used)
          contribute(node.inputs[0],
                     LinearRule::grad_x(*grad, *params_[static_cast<std::size_t>(linear->members()[i].weight)]));
      if (linear->residual()) contribute(node.inputs[1], at(node.outputs[0]).grad_made);
      return;
    }
    if (lora_of(node)) {
      for (std::size_t i = 0; i < node.outputs.size(); ++i)
        contribute(node.inputs[i + 1], at(node.outputs[i]).grad_made);
      return;
    }
    const ParallelState grad = *at(node.outputs[0]).grad_used;
    for (const auto input : node.inputs) {
      const ParallelState x = at(input).used;
      if (is(node, "gather_rows"))
        contribute(input, x);  // of whole rows every rank has what it wants
      else if (is(node, "attention"))
        contribute(input, x == grad ? grad : kPending);  // of a copy's heads, the rank's own
      else
        contribute(input, ActivationRule::grad_x(grad, x));
    }
  }

  const Graph& graph_;
  ParallelState residual_;
  ParallelBackbone plan_;
  std::vector<Demand> demands_;
  std::vector<std::optional<ParallelState>> params_;
};

std::vector<ParallelState> both(ParallelState first, ParallelState second) {
  if (first == second) return {first};
  return {first, second};
}

}  // namespace

ParallelBackbone parallelize_backbone(const Graph& graph, const BackboneOptions& options) {
  require(options.ranks >= 1, "tensor_parallel_size: ", options.ranks, ", wanted >= 1");
  return Pass(graph, options).run();
}

std::vector<BackboneTransition> backbone_transitions(const Graph& graph, const ParallelBackbone& backbone) {
  std::vector<BackboneTransition> all;
  const auto add = [&](TensorId id, const Node& node, bool backward, ParallelState from, ParallelState to,
                       std::int64_t features, DType dtype) {
    if (from == to) return;
    all.push_back({id,
                   node.phase,
                   backward,
                   {from, to},
                   graph.tensor(id).rows,
                   features,
                   static_cast<std::int64_t>(dtype_size(dtype))});
  };
  for (const auto& node : graph.nodes) {
    const bool loss = node.op->name() == "linear_cross_entropy";
    if (loss)
      for (const std::int64_t features : {1, 2})
        add(node.outputs[0], node, false, kPending, kReplicated, features, DType::kFloat32);
    for (const auto id : node.outputs) {
      const auto& tensor = backbone.tensors[static_cast<std::size_t>(id)];
      const std::int64_t width = graph.tensor(id).width;
      add(id, node, false, tensor.made, tensor.used, width, graph.tensor(id).dtype);
      if (tensor.grad_used) add(id, node, true, *tensor.grad_made, *tensor.grad_used, width, DType::kFloat32);
    }
  }
  return all;
}

SiteStates bypass_states(const Graph& graph, const ParallelBackbone& backbone, TensorId x_tensor, TensorId y_tensor) {
  const auto& x = backbone.tensors.at(static_cast<std::size_t>(x_tensor));
  const auto& y = backbone.tensors.at(static_cast<std::size_t>(y_tensor));
  for (const auto id : {x_tensor, y_tensor})
    require<Error>(backbone.tensors[static_cast<std::size_t>(id)].grad_used.has_value(),
                   "tensor parallel: ", graph.tensor(id).name, " has no gradient");
  return {.x = both(x.made, x.used),
          .y = both(y.made, y.used),
          .grad_y = both(*y.grad_made, *y.grad_used),
          .grad_x = both(*x.grad_made, *x.grad_used),
          .x_tensor = x_tensor,
          .y_tensor = y_tensor};
}

SiteStates site_states(const Graph& graph, const ParallelBackbone& backbone, SiteId site) {
  const LinearSite& wanted = graph.sites.at(static_cast<std::size_t>(site));
  for (const auto& node : graph.nodes) {
    const auto* linear = dynamic_cast<const LinearOp*>(node.op.get());
    if (linear == nullptr) continue;
    for (std::size_t i = 0; i < node.outputs.size(); ++i) {
      const auto id = static_cast<std::size_t>(linear->members()[i].weight);
      if (linear->members()[i].weight != wanted.weight) continue;
      SiteStates states = bypass_states(graph, backbone, node.inputs[0], node.outputs[i]);
      states.weight = backbone.params[id];
      return states;
    }
  }
  throw Error(str("tensor parallel: no linear has the weight of ", wanted.path));
}

}  // namespace flexcore
