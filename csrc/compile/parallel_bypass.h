#pragma once

#include <string>
#include <vector>

#include "compile/parallel_backbone.h"
#include "compile/parallel_transition.h"
#include "flexcore/plan.h"
#include "graph/bypass_form.h"

namespace flexcore {

/// States of one step of a bypass, forward and backward. What a step reads may be in another state than what the step
/// before it made: then there is a transition between.
struct ParallelStep {
  ParallelState x, weight, y;         // forward; of an activation `weight` says nothing
  ParallelState grad_y, saved_x;      // as the backward reads them, both for the gradient of x and of the weight
  ParallelState grad_x, grad_weight;  // as it makes them
};

/// Dependent parallelization of one bypass: where it leaves the backbone, how it is computed, where it joins.
struct BypassPlan {
  ParallelState read = kReplicated;  // the state of X that it begins with, one of SiteStates::x
  std::vector<ParallelStep> steps;
  ParallelState join = kReplicated;       // of Y, one of SiteStates::y
  ParallelState grad_read = kReplicated;  // of Y's gradient, one of SiteStates::grad_y
  ParallelState grad_join = kReplicated;  // of X's gradient, one of SiteStates::grad_x
};

enum class PlanPart : std::uint8_t {
  kForward,
  kBackward,
  kStep,  // once an optimizer step: a weight's gradient to the state of the weight
};

/// Sizes of a site's tensors; what is between the steps, and every gradient inside, is float32.
struct BypassSizes {
  std::int64_t tokens = 512;              // of a pass, forward and backward
  std::int64_t tokens_per_step = 8192;    // of an optimizer step
  std::int64_t x_bytes = 2, y_bytes = 2;  // of an element of X; of Y and its gradient
};
inline constexpr std::int64_t kInnerBytes = 4;

struct PlannedTransition {
  PlanPart part = PlanPart::kForward;
  Transition transition;
  std::string tensor;  // "x", "u", "y", "grad y", "grad A"
  std::int64_t rows = 0, features = 0, element_bytes = 0;
  std::int64_t most_bytes(int ranks) const { return most_bytes_sent(transition, rows, features, element_bytes, ranks); }
};
/// All transitions of a plan, those that move nothing left out.
std::vector<PlannedTransition> transitions(const BypassForm& form, const BypassPlan& plan, const BypassSizes& sizes);

/// Every plan that the rules and transitions allow: a weight stays in one state, and a step's backward brings the
/// gradient to one state, which both its products read.
std::vector<BypassPlan> enumerate_plans(const BypassForm& form, const SiteStates& site);

struct BypassCost {
  double forward_seconds = 0, backward_seconds = 0;  // of a pass: the slowest rank's products, and what it waits for
  double step_seconds = 0;                           // the sums of an optimizer step
  double seconds = 0;                                // of a pass, with its share of the optimizer step
  double forward_bytes = 0, backward_bytes = 0;      // sent by a rank, a token
  std::int64_t step_bytes = 0;                       // sent by a rank, an optimizer step
  int collectives = 0;                               // of a pass
  std::int64_t parameter_bytes = 0, gradient_bytes = 0, optimizer_bytes = 0;  // of the rank that has the most
  double saved_bytes = 0;                                                     // a token, for the backward
  double memory_bytes = 0;                                                    // all of these, of a pass
};
BypassCost cost_of(const BypassForm& form, const BypassPlan& plan, const BypassSizes& sizes, int ranks,
                   const ParallelRates& rates);

struct BypassCandidate {
  BypassPlan plan;
  BypassCost cost;
  int dominated_by = -1;  // index of a candidate that is at least as good in everything; -1: none is
  bool equal = false;     // costs the same as that one
  std::string reason;     // why it is out
};

/// All candidates of a site, and the one that takes least time; memory breaks ties, then the number of collectives.
struct BypassChoice {
  std::vector<BypassCandidate> candidates;
  int chosen = -1;
  int kept = 0;  // that no other dominates
  const BypassCandidate& best() const { return candidates[static_cast<std::size_t>(chosen)]; }
};
BypassChoice choose_plan(const BypassForm& form, const SiteStates& site, const BypassSizes& sizes, int ranks,
                         const ParallelRates& rates);

/// "x|k A|in u+ B= y+": states of tensors and weights in order; "u+>=" where one is moved.
std::string summary(const BypassForm& form, const BypassPlan& plan);
/// The plan in words: "A split over in; u left a sum; B whole on every rank; y joins the linear's own sum, ...".
std::string explain(const BypassForm& form, const SiteStates& site, const BypassPlan& plan);
/// Name of what a step makes, the last one "y": "u", "u2".
std::string step_output(const BypassForm& form, std::size_t step);

}  // namespace flexcore
