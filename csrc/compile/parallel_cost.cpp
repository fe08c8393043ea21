#include <algorithm>

#include "compile/parallel_bypass.h"
#include "core/check.h"

namespace flexcore {

namespace {

using Kind = BypassStep::Kind;

struct Work {
  double flops = 0, bytes = 0;  // of the rank that has the most; bytes of weights
  void operator+=(const Work& other) {
    flops += other.flops;
    bytes += other.bytes;
  }
};

std::int64_t most(std::int64_t size, bool split, int ranks) {
  return split ? share_of(size, ranks - 1, ranks).size() : size;
}

// [m, k] times [k, n], in the states of the factors.
double product_flops(ParallelState a, ParallelState b, std::int64_t m, std::int64_t k, std::int64_t n, int ranks) {
  return 2.0 * static_cast<double>(most(m, a == kRowSplit, ranks)) *
         static_cast<double>(most(k, a == kFeatureSplit, ranks)) *
         static_cast<double>(most(n, b == kFeatureSplit, ranks));
}

double most_elements(ParallelState state, std::int64_t rows, std::int64_t features, int ranks) {
  return static_cast<double>(largest_local_shape(state, rows, features, ranks).size());
}

std::int64_t weight_rows(const BypassStep& step) { return step.kind == Kind::kLinear ? step.out_features : 1; }
bool trains(const BypassStep& step) { return step.kind != Kind::kActivation; }

}  // namespace

std::string step_output(const BypassForm& form, std::size_t step) {
  if (step + 1 == form.steps.size()) return "y";
  return step == 0 ? "u" : str("u", step + 1);
}

std::vector<PlannedTransition> transitions(const BypassForm& form, const BypassPlan& plan, const BypassSizes& sizes) {
  std::vector<PlannedTransition> all;
  const auto add = [&](PlanPart part, ParallelState from, ParallelState to, const std::string& tensor,
                       std::int64_t rows, std::int64_t features, std::int64_t bytes) {
    if (from != to) all.push_back({part, {from, to}, tensor, rows, features, bytes});
  };
  const std::size_t n = form.steps.size();
  const auto input = [&](std::size_t i) { return i == 0 ? std::string("x") : step_output(form, i - 1); };
  const auto input_bytes = [&](std::size_t i) { return i == 0 ? sizes.x_bytes : kInnerBytes; };
  ParallelState state = plan.read;
  for (std::size_t i = 0; i < n; ++i) {
    add(PlanPart::kForward, state, plan.steps[i].x, input(i), sizes.tokens, form.steps[i].in_features, input_bytes(i));
    state = plan.steps[i].y;
  }
  add(PlanPart::kForward, state, plan.join, "y", sizes.tokens, form.steps.back().out_features, sizes.y_bytes);
  state = plan.grad_read;
  for (std::size_t i = n; i-- > 0;) {
    const auto& step = plan.steps[i];
    const auto& form_step = form.steps[i];
    add(PlanPart::kBackward, state, step.grad_y, "grad " + step_output(form, i), sizes.tokens, form_step.out_features,
        i + 1 == n ? sizes.y_bytes : kInnerBytes);
    add(PlanPart::kBackward, step.x, step.saved_x, input(i), sizes.tokens, form_step.in_features, input_bytes(i));
    if (trains(form_step))
      add(PlanPart::kStep, step.grad_weight, step.weight, "grad " + form_step.name, weight_rows(form_step),
          form_step.in_features, kInnerBytes);
    state = step.grad_x;
  }
  add(PlanPart::kBackward, state, plan.grad_join, "grad x", sizes.tokens, form.steps.front().in_features, kInnerBytes);
  return all;
}

BypassCost cost_of(const BypassForm& form, const BypassPlan& plan, const BypassSizes& sizes, int ranks,
                   const ParallelRates& rates) {
  Work forward, backward;
  BypassCost cost;
  const std::int64_t t = sizes.tokens;
  for (std::size_t i = 0; i < form.steps.size(); ++i) {
    const auto& form_step = form.steps[i];
    const auto& step = plan.steps[i];
    const std::int64_t in = form_step.in_features, out = form_step.out_features;
    if (trains(form_step)) {
      const double weight = most_elements(step.weight, weight_rows(form_step), in, ranks) * kInnerBytes;
      const double gradient = most_elements(step.grad_weight, weight_rows(form_step), in, ranks) * kInnerBytes;
      cost.parameter_bytes += static_cast<std::int64_t>(weight);
      cost.gradient_bytes += static_cast<std::int64_t>(std::max(weight, gradient));
      forward.bytes += weight;
      backward.bytes += weight + gradient;
    }
    if (form_step.kind == Kind::kLinear) {
      const ParallelState across = transposed(step.weight);
      forward.flops += product_flops(step.x, across, t, in, out, ranks);
      backward.flops += product_flops(step.grad_y, step.weight, t, out, in, ranks) +
                        product_flops(transposed(step.grad_y), step.saved_x, out, t, in, ranks);
    } else {  // no product: what it reads and writes
      forward.bytes += 2 * most_elements(step.x, t, in, ranks) * kInnerBytes;
      backward.bytes += 3 * most_elements(step.grad_y, t, in, ranks) * kInnerBytes;
    }
    // The backbone keeps its own X; what was moved to get another state of it is kept beside it.
    const bool own = i > 0 || Transition{plan.read, step.x}.collective();
    if (own)
      cost.saved_bytes += most_elements(step.x, t, in, ranks) *
                          static_cast<double>(i == 0 ? sizes.x_bytes : kInnerBytes) / static_cast<double>(t);
  }
  const auto time = [&](const Work& work) {
    return work.flops / rates.flops_per_second + work.bytes / rates.memory_bytes_per_second;
  };
  cost.forward_seconds = time(forward);
  cost.backward_seconds = time(backward);
  for (const auto& moved : transitions(form, plan, sizes)) {
    if (ranks == 1 || !moved.transition.collective()) continue;
    const auto bytes = static_cast<double>(moved.most_bytes(ranks));
    const double seconds = bytes / rates.link_bytes_per_second + rates.collective_seconds;
    const double per_token = bytes_sent_per_row(moved.transition, moved.features, moved.element_bytes, ranks);
    switch (moved.part) {
      case PlanPart::kForward:
        cost.forward_seconds += seconds;
        cost.forward_bytes += per_token;
        ++cost.collectives;
        break;
      case PlanPart::kBackward:
        cost.backward_seconds += seconds;
        cost.backward_bytes += per_token;
        ++cost.collectives;
        break;
      case PlanPart::kStep:
        cost.step_seconds += seconds;
        cost.step_bytes += static_cast<std::int64_t>(bytes);
        break;
    }
  }
  const double passes = std::max(1.0, static_cast<double>(sizes.tokens_per_step) / static_cast<double>(t));
  cost.seconds = cost.forward_seconds + cost.backward_seconds + cost.step_seconds / passes;
  cost.optimizer_bytes = 2 * cost.parameter_bytes;  // AdamW's moments
  cost.memory_bytes = static_cast<double>(cost.parameter_bytes + cost.gradient_bytes + cost.optimizer_bytes) +
                      cost.saved_bytes * static_cast<double>(t);
  return cost;
}

}  // namespace flexcore
