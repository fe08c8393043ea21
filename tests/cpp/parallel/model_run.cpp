#include "parallel/model_run.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/philox.h"
#include "graph/linear_op.h"

namespace flexcore::test {

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

const LinearOp* linear_of(const Node& node) { return dynamic_cast<const LinearOp*>(node.op.get()); }

Block random_parameter(const GraphParam& param, ParamId id) {
  const bool vector = param.in_features == 0;
  Block block(vector ? 1 : param.out_features, vector ? param.out_features : param.in_features);
  const auto bias = param.name.ends_with(".bias");
  const double scale = vector ? 0.4 : 1.7 / std::sqrt(static_cast<double>(block.features));
  for (std::size_t i = 0; i < block.data.size(); ++i)
    block.data[i] = static_cast<float>((vector && !bias ? 1.0 : 0.0) +
                                       2 * scale * (uniform(static_cast<std::uint64_t>(id), i) - 0.5));
  return block;
}

}  // namespace

ModelRun::ModelRun(const Graph& graph, const ModelConfig& config, const BackboneOptions& options, Ranks& ranks)
    : graph_(graph), config_(config), ranks_(ranks), backbone_(parallelize_backbone(graph, options)) {
  std::mt19937 rng(5);
  for (std::size_t i = 0; i < graph.params.size(); ++i) {
    whole_.push_back(random_parameter(graph.params[i], static_cast<ParamId>(i)));
    params_.push_back(ranks.scatter(whole_.back(), backbone_.params[i], rng));
  }
}

void ModelRun::attach(SiteId site, const BypassForm& form, const BypassPlan& plan, const std::vector<Block>& weights) {
  const SiteStates states = site_states(graph_, backbone_, site);
  const auto bytes = [&](TensorId id) { return static_cast<std::int64_t>(dtype_size(graph_.tensor(id).dtype)); };
  const BypassSizes sizes{.tokens = 0, .x_bytes = bytes(states.x_tensor), .y_bytes = bytes(states.y_tensor)};
  attached_.push_back({site, states, std::make_unique<BypassRun>(ranks_, form, plan, sizes, weights)});
}

std::int64_t ModelRun::rows_of(RowSet rows, std::int64_t num_tokens) const {
  return rows == RowSet::kTargets ? num_tokens - 1 : num_tokens;
}

std::int64_t ModelRun::planned_bytes(int rank, std::int64_t num_tokens) const {
  std::int64_t bytes = 0;
  for (const auto& moved : backbone_transitions(graph_, backbone_))
    bytes += bytes_sent(moved.transition, rows_of(moved.rows, num_tokens), moved.features, moved.element_bytes, rank,
                        ranks_.count());
  for (const auto& bypass : attached_) bytes += bypass.run->planned_bytes(rank, num_tokens);
  return bytes;
}

Sharded ModelRun::compute(std::int64_t rows, std::int64_t features, ParallelState state,
                          const std::function<void(int, Block&)>& fill) const {
  Sharded out = ranks_.zeros(state, rows, features);
  for (int r = 0; r < ranks_.count(); ++r) fill(r, out.local[at(r)]);
  return out;
}

// What a node made, and the transition to what its readers read.
void ModelRun::made(TensorId id, Sharded value) {
  const auto& plan = backbone_.tensors[at(id)];
  require<Error>(value.state == plan.made, graph_.tensor(id).name, " is made in state ", tensor_text(value.state));
  made_[id] = value;
  used_[id] = ranks_.move(value, plan.used, static_cast<std::int64_t>(dtype_size(graph_.tensor(id).dtype)));
}

void ModelRun::contribute(TensorId id, Sharded gradient) {
  const ParallelState state = *backbone_.tensors[at(id)].grad_made;
  if (gradient.state != state) {
    require<Error>(!Transition{gradient.state, state}.collective(), "gradient of ", graph_.tensor(id).name,
                   " in state ", tensor_text(gradient.state));
    gradient = ranks_.move(gradient, state);
  }
  const auto known = grad_made_.find(id);
  if (known == grad_made_.end())
    grad_made_[id] = std::move(gradient);
  else
    add_to(known->second, gradient);
}

const Sharded& ModelRun::grad_used(TensorId id) {
  const auto known = grad_used_.find(id);
  if (known != grad_used_.end()) return known->second;
  Sharded grad = ranks_.move(grad_made_.at(id), *backbone_.tensors[at(id)].grad_used);
  for (const auto& late : late_[id]) add_to(grad, late);
  return grad_used_[id] = std::move(grad);
}

const Sharded& ModelRun::in_state(const Sharded& made, const Sharded& used, ParallelState state) const {
  if (made.state == state) return made;
  require<Error>(used.state == state, "the backbone has no tensor in state ", tensor_text(state));
  return used;
}

ModelRun::Result ModelRun::run(const std::vector<std::int32_t>& tokens) {
  tokens_ = tokens;
  for (auto* values : {&made_, &used_, &grad_made_, &grad_used_}) values->clear();
  late_.clear();
  for (const auto& node : graph_.nodes) forward(node);
  for (auto i = graph_.nodes.size(); i-- > 0;)
    if (graph_.nodes[i].phase != Phase::kSampleHead) backward(graph_.nodes[i]);
  Result result{.hidden = ranks_.value(value(graph_.hidden)),
                .logits = ranks_.value(value(graph_.logits)),
                .losses = losses_,
                .grad_input = ranks_.value(grad_used(graph_.nodes[0].outputs[0]))};
  for (const auto& bypass : attached_) result.weight_gradients[bypass.site] = bypass.run->gradients();
  return result;
}

void ModelRun::forward(const Node& node) {
  const auto name = node.op->name();
  if (linear_of(node)) return forward_linear(node);
  if (name == "linear_cross_entropy") return cross_entropy(node);
  const TensorId y = node.outputs[0];
  const auto& tensor = graph_.tensor(y);
  const std::int64_t rows = rows_of(tensor.rows, static_cast<std::int64_t>(tokens_.size()));
  const ParallelState state = backbone_.tensors[at(y)].made;
  if (name == "embedding") {
    const Sharded& table = weight(node.op->params()[0]);
    made(y, compute(rows, tensor.width, state, [&](int r, Block& out) {
           const Share mine = share_of(table.rows, r, ranks_.count());
           for (std::int64_t t = 0; t < rows; ++t)
             for (std::int64_t j = 0; j < tensor.width; ++j)
               if (tokens_[at(t)] >= mine.begin && tokens_[at(t)] < mine.end)
                 out.at(t, j) = table.local[at(r)].at(tokens_[at(t)] - mine.begin, j);
         }));
    return;
  }
  const Sharded& x = value(node.inputs[0]);
  if (name == "attention") {
    const auto lse = node.outputs[1];  // this executor makes probabilities again
    made(lse, ranks_.zeros(state, rows, graph_.tensor(lse).width));
    made(y, compute(rows, tensor.width, state,
                    [&](int r, Block& out) { out = attend(r, node, nullptr, nullptr, nullptr, nullptr); }));
    return;
  }
  made(y, compute(rows, tensor.width, state, [&](int r, Block& out) {
         const Block& in = x.local[at(r)];
         if (name == "rms_norm") {
           const Block& gain = weight(node.op->params()[0]).local[at(r)];
           for (std::int64_t t = 0; t < in.rows; ++t)
             for (std::int64_t g = 0; g < in.features; g += gain.features) {
               double squares = 0;
               for (std::int64_t j = 0; j < gain.features; ++j) squares += std::pow(in.at(t, g + j), 2);
               const double scale = 1 / std::sqrt(squares / static_cast<double>(gain.features) + config_.rms_norm_eps);
               for (std::int64_t j = 0; j < gain.features; ++j)
                 out.at(t, g + j) = static_cast<float>(in.at(t, g + j) * scale * gain.at(0, j));
             }
         } else if (name == "rotary") {
           rotate(in, out, node.op->coupling().features, false);
         } else if (name == "silu_mul") {
           const Block& up = value(node.inputs[1]).local[at(r)];
           for (std::size_t i = 0; i < in.data.size(); ++i)
             out.data[i] =
                 static_cast<float>(in.data[i] / (1 + std::exp(-static_cast<double>(in.data[i]))) * up.data[i]);
         } else if (name == "gather_rows") {
           const Share mine = local_shape(x.state, x.rows, x.features, r, ranks_.count()).rows;
           for (std::int64_t t = std::max<std::int64_t>(mine.begin, 0); t < std::min(mine.end, rows); ++t)
             for (std::int64_t j = 0; j < in.features; ++j) out.at(t, j) = in.at(t - mine.begin, j);
         } else {
           throw Error(str("no loop for operator ", name));
         }
       }));
}

void ModelRun::rotate(const Block& in, Block& out, std::int64_t head_dim, bool inverse) const {
  for (std::int64_t t = 0; t < in.rows; ++t)
    for (std::int64_t h = 0; h < in.features; h += head_dim)
      for (std::int64_t j = 0; j < head_dim / 2; ++j) {
        const double angle = static_cast<double>(t) * std::pow(config_.rope.theta, -2.0 * static_cast<double>(j) /
                                                                                       static_cast<double>(head_dim));
        const double c = std::cos(angle), s = inverse ? -std::sin(angle) : std::sin(angle);
        const double a = in.at(t, h + j), b = in.at(t, h + j + head_dim / 2);
        out.at(t, h + j) = static_cast<float>(a * c - b * s);
        out.at(t, h + j + head_dim / 2) = static_cast<float>(b * c + a * s);
      }
}

void ModelRun::forward_linear(const Node& node) {
  const auto& linear = *linear_of(node);
  for (std::size_t i = 0; i < node.outputs.size(); ++i) {
    const TensorId y = node.outputs[i];
    const auto& member = linear.members()[i];
    const auto& plan = backbone_.tensors[at(y)];
    const Sharded& x = value(node.inputs[0]);
    Sharded product = local_product(ranks_, x, transpose(weight(member.weight)), plan.made);
    if (member.bias != kNoParam) {
      const Sharded& bias = weight(member.bias);
      for (int r = 0; r < ranks_.count(); ++r) {
        if (plan.made == kPending && r > 0) continue;  // a summand of one rank
        Block& out = product.local[at(r)];
        for (std::int64_t t = 0; t < out.rows; ++t)
          for (std::int64_t j = 0; j < out.features; ++j) out.at(t, j) += bias.local[at(r)].at(0, j);
      }
    }
    std::vector<Sharded> late;
    for (auto& bypass : attached_) {
      if (bypass.states.y_tensor != y) continue;
      const auto& read = in_state(made_.at(node.inputs[0]), x, bypass.run->plan().read);
      Sharded added = bypass.run->forward(read);
      if (added.state == plan.made)
        add_to(product, added);
      else
        late.push_back(std::move(added));
    }
    made(y, std::move(product));
    for (const auto& added : late) add_to(used_.at(y), added);
    if (linear.residual()) add_to(used_.at(y), value(node.inputs[1]));
  }
}

void ModelRun::backward(const Node& node) {
  const auto name = node.op->name();
  if (name == "embedding" || name == "linear_cross_entropy") return;
  if (linear_of(node)) return backward_linear(node);
  const Sharded& grad = grad_used(node.outputs[0]);
  const Sharded& x = value(node.inputs[0]);
  if (name == "attention") {
    std::array<Sharded, 3> grads;
    for (std::size_t i = 0; i < 3; ++i) {
      const auto& input = value(node.inputs[i]);
      grads[i] = ranks_.zeros(input.state == grad.state ? grad.state : kPending, input.rows, input.features);
    }
    for (int r = 0; r < ranks_.count(); ++r)
      attend(r, node, &grad.local[at(r)], &grads[0].local[at(r)], &grads[1].local[at(r)], &grads[2].local[at(r)]);
    for (std::size_t i = 0; i < 3; ++i) contribute(node.inputs[i], std::move(grads[i]));
    return;
  }
  const ParallelState state = name == "gather_rows" ? x.state : grad.state;
  Sharded grad_x = ranks_.zeros(state, x.rows, x.features);
  Sharded grad_up = grad_x;
  for (int r = 0; r < ranks_.count(); ++r) {
    const Block &g = grad.local[at(r)], &in = x.local[at(r)];
    Block& out = grad_x.local[at(r)];
    if (name == "rms_norm") {
      const Block& gain = weight(node.op->params()[0]).local[at(r)];
      const auto width = static_cast<double>(gain.features);
      for (std::int64_t t = 0; t < in.rows; ++t)
        for (std::int64_t h = 0; h < in.features; h += gain.features) {
          double squares = 0, along = 0;
          for (std::int64_t j = 0; j < gain.features; ++j) {
            squares += std::pow(in.at(t, h + j), 2);
            along += static_cast<double>(g.at(t, h + j)) * gain.at(0, j) * in.at(t, h + j);
          }
          const double scale = 1 / std::sqrt(squares / width + config_.rms_norm_eps);
          for (std::int64_t j = 0; j < gain.features; ++j)
            out.at(t, h + j) = static_cast<float>(
                scale * (g.at(t, h + j) * gain.at(0, j) - in.at(t, h + j) * scale * scale * along / width));
        }
    } else if (name == "rotary") {
      rotate(g, out, node.op->coupling().features, true);
    } else if (name == "silu_mul") {
      const Block& up = value(node.inputs[1]).local[at(r)];
      for (std::size_t i = 0; i < g.data.size(); ++i) {
        const double s = 1 / (1 + std::exp(-static_cast<double>(in.data[i])));
        out.data[i] = static_cast<float>(g.data[i] * up.data[i] * s * (1 + in.data[i] * (1 - s)));
        grad_up.local[at(r)].data[i] = static_cast<float>(g.data[i] * in.data[i] * s);
      }
    } else if (name == "gather_rows") {
      const Share mine = local_shape(x.state, x.rows, x.features, r, ranks_.count()).rows;
      for (std::int64_t t = mine.begin; t < std::min(mine.end, g.rows); ++t)
        for (std::int64_t j = 0; j < g.features; ++j) out.at(t - mine.begin, j) = g.at(t, j);
    }
  }
  contribute(node.inputs[0], std::move(grad_x));
  if (name == "silu_mul") contribute(node.inputs[1], std::move(grad_up));
}

void ModelRun::backward_linear(const Node& node) {
  const auto& linear = *linear_of(node);
  const TensorId x = node.inputs[0];
  const auto& x_plan = backbone_.tensors[at(x)];
  for (std::size_t i = 0; i < node.outputs.size(); ++i) {
    const TensorId y = node.outputs[i];
    const Sharded& grad = grad_used(y);
    const auto state = LinearRule::grad_x(grad.state, weight(linear.members()[i].weight).state);
    require<Error>(state.has_value(), "no rule for the gradient of a linear's input");
    contribute(x, local_product(ranks_, grad, weight(linear.members()[i].weight), *state));
    for (auto& bypass : attached_) {
      if (bypass.states.y_tensor != y) continue;
      Sharded added = bypass.run->backward(in_state(grad_made_.at(y), grad, bypass.run->plan().grad_read));
      if (added.state == *x_plan.grad_made)
        contribute(x, std::move(added));
      else
        late_[x].push_back(std::move(added));
    }
  }
  if (linear.residual()) contribute(node.inputs[1], grad_made_.at(node.outputs[0]));
}

}  // namespace flexcore::test
