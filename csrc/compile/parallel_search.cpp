#include <algorithm>
#include <limits>

#include "compile/parallel_bypass.h"

namespace flexcore {

namespace {

using Kind = BypassStep::Kind;

std::optional<ParallelState> forward_rule(Kind kind, ParallelState x, ParallelState w) {
  switch (kind) {
    case Kind::kLinear:
      return LinearRule::y(x, w);
    case Kind::kVector:
      return VectorRule::y(x, w);
    case Kind::kActivation:
      return w == kReplicated ? ActivationRule::y(x) : std::nullopt;  // no weight: one state stands for none
  }
  return {};
}

struct Gradients {
  ParallelState grad_x, grad_weight;
};

std::optional<Gradients> backward_rule(Kind kind, const ParallelStep& step, ParallelState grad_y, ParallelState x) {
  std::optional<ParallelState> grad_x, grad_weight;
  if (kind == Kind::kLinear) {
    grad_x = LinearRule::grad_x(grad_y, step.weight);
    grad_weight = LinearRule::grad_w(grad_y, x);
  } else if (kind == Kind::kVector) {
    grad_x = VectorRule::grad_x(grad_y, step.weight);
    grad_weight = VectorRule::grad_w(grad_y, x);
  } else {
    grad_x = ActivationRule::grad_x(grad_y, x);
    grad_weight = kReplicated;
  }
  if (!grad_x || !grad_weight) return {};
  return Gradients{*grad_x, *grad_weight};
}

// Weights are not kept as sums: an optimizer that is not linear could not step them.
bool may_keep(ParallelState weight) { return weight != kPending; }

// Of what the backbone has, the state from which getting to `wanted` sends least.
ParallelState nearest(const std::vector<ParallelState>& have, ParallelState wanted) {
  ParallelState best = have.front();
  double least = std::numeric_limits<double>::max();
  for (const auto state : have)
    if (const double bytes = bytes_sent_per_row({state, wanted}, 1, 1, 4); bytes < least) {
      least = bytes;
      best = state;
    }
  return best;
}

class Search {
 public:
  Search(const BypassForm& form, const SiteStates& site) : form_(form), site_(site) {
    plan_.steps.resize(form.steps.size());
  }
  std::vector<BypassPlan> run() {
    forward(0);
    return std::move(found_);
  }

 private:
  void forward(std::size_t i) {
    if (i == plan_.steps.size()) {
      for (const auto join : site_.y) {
        plan_.join = join;
        backward(i);
      }
      return;
    }
    for (const auto x : kParallelStates)
      for (const auto weight : kParallelStates) {
        const auto y = forward_rule(form_.steps[i].kind, x, weight);
        if (!y || !may_keep(weight)) continue;
        if (i == 0) plan_.read = nearest(site_.x, x);
        plan_.steps[i] = {.x = x, .weight = weight, .y = *y};
        forward(i + 1);
      }
  }

  void backward(std::size_t i) {
    if (i == 0) {
      for (const auto join : site_.grad_x) {
        plan_.grad_join = join;
        found_.push_back(plan_);
      }
      return;
    }
    ParallelStep& step = plan_.steps[i - 1];
    for (const auto grad_y : kParallelStates)
      for (const auto saved_x : kParallelStates) {
        // An activation's own mask lies where its input did, or is cut out of a copy.
        if (form_.steps[i - 1].kind == Kind::kActivation && saved_x != step.x && step.x != kReplicated) continue;
        const auto gradients = backward_rule(form_.steps[i - 1].kind, step, grad_y, saved_x);
        if (!gradients) continue;
        if (i == plan_.steps.size()) plan_.grad_read = nearest(site_.grad_y, grad_y);
        step.grad_y = grad_y;
        step.saved_x = saved_x;
        step.grad_x = gradients->grad_x;
        step.grad_weight = gradients->grad_weight;
        backward(i - 1);
      }
  }

  const BypassForm& form_;
  const SiteStates& site_;
  BypassPlan plan_;
  std::vector<BypassPlan> found_;
};

// At least as good in every respect.
bool no_worse(const BypassCost& a, const BypassCost& b) {
  const auto le = [](double x, double y) { return x <= y * (1 + 1e-12); };
  return le(a.forward_seconds, b.forward_seconds) && le(a.backward_seconds, b.backward_seconds) &&
         le(a.step_seconds, b.step_seconds) && le(a.memory_bytes, b.memory_bytes);
}

std::string worse_in(const BypassCost& cost, const BypassCost& than) {
  const auto more = [](double a, double b) { return a > b * (1 + 1e-12); };
  std::string text;
  const auto add = [&](bool is, const char* what) {
    if (is) text += (text.empty() ? "" : ", ") + std::string(what);
  };
  add(more(cost.forward_seconds, than.forward_seconds), "forward");
  add(more(cost.backward_seconds, than.backward_seconds), "backward");
  add(more(cost.step_seconds, than.step_seconds), "optimizer step");
  add(more(cost.memory_bytes, than.memory_bytes), "memory");
  return text;
}

}  // namespace

std::vector<BypassPlan> enumerate_plans(const BypassForm& form, const SiteStates& site) {
  return Search(form, site).run();
}

BypassChoice choose_plan(const BypassForm& form, const SiteStates& site, const BypassSizes& sizes, int ranks,
                         const ParallelRates& rates) {
  BypassChoice choice;
  for (auto& plan : enumerate_plans(form, site)) {
    const BypassCost cost = cost_of(form, plan, sizes, ranks, rates);
    choice.candidates.push_back({std::move(plan), cost});
  }
  auto& all = choice.candidates;
  // Better ones first, so that what dominates one is found among those that are kept.
  std::vector<int> order(all.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
    const auto &a = all[static_cast<std::size_t>(i)].cost, &b = all[static_cast<std::size_t>(j)].cost;
    const double slack = 1e-12 * std::max(a.seconds, b.seconds);
    if (a.seconds < b.seconds - slack || a.seconds > b.seconds + slack) return a.seconds < b.seconds;
    if (a.memory_bytes != b.memory_bytes) return a.memory_bytes < b.memory_bytes;
    return a.collectives < b.collectives;
  });
  std::vector<int> kept;
  for (const int i : order) {
    auto& candidate = all[static_cast<std::size_t>(i)];
    const auto by = std::find_if(kept.begin(), kept.end(), [&](int k) {
      return no_worse(all[static_cast<std::size_t>(k)].cost, candidate.cost);
    });
    if (by == kept.end()) {
      kept.push_back(i);
      continue;
    }
    const auto& better = all[static_cast<std::size_t>(*by)];
    candidate.dominated_by = *by;
    const std::string worse = worse_in(candidate.cost, better.cost);
    candidate.equal = worse.empty();
    candidate.reason =
        (worse.empty() ? "costs the same as " : "more " + worse + ", nothing less than ") + summary(form, better.plan);
  }
  choice.chosen = kept.front();
  choice.kept = static_cast<int>(kept.size());
  return choice;
}

}  // namespace flexcore
