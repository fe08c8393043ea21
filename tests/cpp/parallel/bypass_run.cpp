#include "parallel/bypass_run.h"

#include <utility>

namespace flexcore::test {

namespace {

using Kind = BypassStep::Kind;

Block multiply(const Block& a, const Block& b) {
  require<Error>(a.features == b.rows, "product of ", a.rows, " x ", a.features, " and ", b.rows, " x ", b.features);
  Block c(a.rows, b.features);
  std::vector<double> row(static_cast<std::size_t>(c.features));
  for (std::int64_t i = 0; i < c.rows; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (std::int64_t k = 0; k < a.features; ++k)
      for (std::int64_t j = 0; j < c.features; ++j)
        row[static_cast<std::size_t>(j)] += static_cast<double>(a.at(i, k)) * b.at(k, j);
    for (std::int64_t j = 0; j < c.features; ++j) c.at(i, j) = static_cast<float>(row[static_cast<std::size_t>(j)]);
  }
  return c;
}

void require_shape(const Block& got, const Block& want, const char* what) {
  require<Error>(got.rows == want.rows && got.features == want.features, what, ": a rank has ", got.rows, " x ",
                 got.features, ", its state says ", want.rows, " x ", want.features);
}

}  // namespace

Sharded local_product(const Ranks& ranks, const Sharded& a, const Sharded& b, ParallelState state) {
  Sharded c = ranks.zeros(state, a.rows, b.features);
  for (std::size_t r = 0; r < c.local.size(); ++r) {
    if (a.local[r].data.empty() || b.local[r].data.empty()) continue;
    Block made = multiply(a.local[r], b.local[r]);
    require_shape(made, c.local[r], "product");
    c.local[r] = std::move(made);
  }
  return c;
}

Sharded transpose(const Sharded& x) {
  Sharded out{transposed(x.state), x.features, x.rows, {}};
  for (const auto& block : x.local) {
    Block t(block.features, block.rows);
    for (std::int64_t i = 0; i < block.rows; ++i)
      for (std::int64_t j = 0; j < block.features; ++j) t.at(j, i) = block.at(i, j);
    out.local.push_back(std::move(t));
  }
  return out;
}

void add_to(Sharded& sum, const Sharded& x) {
  require<Error>(sum.state == x.state, "adds ", tensor_text(x.state), " to ", tensor_text(sum.state));
  for (std::size_t r = 0; r < sum.local.size(); ++r) sum.local[r].add(x.local[r]);
}

BypassRun::BypassRun(Ranks& ranks, BypassForm form, BypassPlan plan, BypassSizes sizes,
                     const std::vector<Block>& weights)
    : ranks_(ranks), form_(std::move(form)), plan_(std::move(plan)), sizes_(sizes), gradients_(weights.size()) {
  std::mt19937 rng(7);
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights_.push_back(ranks.scatter(weights[i], plan_.steps[i].weight, rng));
}

// b may be one row for all rows of a.
Sharded BypassRun::elementwise(const Sharded& a, const Sharded& b, ParallelState state) const {
  Sharded c = ranks_.zeros(state, a.rows, a.features);
  for (std::size_t r = 0; r < c.local.size(); ++r) {
    const Block &x = a.local[r], &y = b.local[r];
    require_shape(x, c.local[r], "elementwise");
    require<Error>(x.data.empty() || (y.features == x.features && (y.rows == x.rows || b.rows == 1)),
                   "elementwise: a rank has ", x.rows, " x ", x.features, " and ", y.rows, " x ", y.features);
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t j = 0; j < x.features; ++j)
        c.local[r].at(i, j) = x.at(i, j) * y.at(b.rows == 1 && a.rows != 1 ? 0 : i, j);
  }
  return c;
}

Sharded BypassRun::step_forward(std::size_t i, const Sharded& x) const {
  const ParallelState state = plan_.steps[i].y;
  switch (form_.steps[i].kind) {
    case Kind::kLinear:
      return local_product(ranks_, x, transpose(weights_[i]), state);
    case Kind::kVector:
      return elementwise(x, weights_[i], state);
    case Kind::kActivation: {
      Sharded y = x;
      y.state = state;
      for (auto& block : y.local)
        for (auto& value : block.data) value = std::max(value, 0.0f);
      return y;
    }
  }
  return {};
}

Sharded BypassRun::forward(const Sharded& x) {
  require<Error>(x.state == plan_.read, "the bypass begins with another state of x");
  saved_.clear();
  Sharded value = x;
  for (std::size_t i = 0; i < form_.steps.size(); ++i) {
    value = ranks_.move(value, plan_.steps[i].x, i == 0 ? sizes_.x_bytes : kInnerBytes);
    saved_.push_back(value);
    value = step_forward(i, value);
  }
  return ranks_.move(value, plan_.join, sizes_.y_bytes);
}

Sharded BypassRun::backward(const Sharded& grad_y) {
  require<Error>(grad_y.state == plan_.grad_read, "the backward begins with another state of grad y");
  Sharded grad = grad_y;
  for (std::size_t i = form_.steps.size(); i-- > 0;) {
    const auto& step = plan_.steps[i];
    grad = ranks_.move(grad, step.grad_y, i + 1 == form_.steps.size() ? sizes_.y_bytes : kInnerBytes);
    const Sharded x = ranks_.move(saved_[i], step.saved_x, i == 0 ? sizes_.x_bytes : kInnerBytes);
    Sharded grad_x, grad_weight;
    switch (form_.steps[i].kind) {
      case Kind::kLinear:
        grad_x = local_product(ranks_, grad, weights_[i], step.grad_x);
        grad_weight = local_product(ranks_, transpose(grad), x, step.grad_weight);
        break;
      case Kind::kVector: {
        grad_x = elementwise(grad, weights_[i], step.grad_x);
        grad_weight = ranks_.zeros(step.grad_weight, 1, x.features);
        for (std::size_t r = 0; r < x.local.size(); ++r)
          for (std::int64_t t = 0; t < x.local[r].rows; ++t)
            for (std::int64_t j = 0; j < x.local[r].features; ++j)
              grad_weight.local[r].at(0, j) += grad.local[r].at(t, j) * x.local[r].at(t, j);
        break;
      }
      case Kind::kActivation: {
        Sharded mask = x;
        for (auto& block : mask.local)
          for (auto& value : block.data) value = value > 0 ? 1.0f : 0.0f;
        grad_x = elementwise(grad, mask, step.grad_x);
        break;
      }
    }
    if (form_.steps[i].kind != Kind::kActivation)
      gradients_[i] = ranks_.value(ranks_.move(grad_weight, step.weight, kInnerBytes));
    grad = std::move(grad_x);
  }
  return ranks_.move(grad, plan_.grad_join, kInnerBytes);
}

std::int64_t BypassRun::planned_bytes(int rank, std::int64_t num_tokens) const {
  BypassSizes sizes = sizes_;
  sizes.tokens = num_tokens;
  std::int64_t bytes = 0;
  for (const auto& moved : transitions(form_, plan_, sizes))
    bytes += bytes_sent(moved.transition, moved.rows, moved.features, moved.element_bytes, rank, ranks_.count());
  return bytes;
}

}  // namespace flexcore::test
