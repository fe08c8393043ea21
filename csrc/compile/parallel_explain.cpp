#include <algorithm>

#include "compile/parallel_bypass.h"
#include "core/check.h"

namespace flexcore {

namespace {

using Kind = BypassStep::Kind;

std::string weight_words(const BypassStep& step, ParallelState weight) {
  if (step.kind == Kind::kActivation) return step.name;
  if (weight == kReplicated) return step.name + " whole on every rank";
  if (weight == kAlone) return step.name + " on rank 0 alone";
  return step.name + " split over " + (weight == kOutSplit ? "out" : step.kind == Kind::kVector ? "features" : "in");
}

std::string moved_words(const std::string& tensor, ParallelState from, ParallelState to) {
  return tensor + " by " + std::string(transition_name(Transition{from, to}.kind())) + " to " + tensor_text(to);
}

// What the backbone does itself from the first of its two states to the second.
std::string own_transition(const std::vector<ParallelState>& states) {
  return std::string(transition_name(Transition{states.front(), states.back()}.kind()));
}

}  // namespace

std::string summary(const BypassForm& form, const BypassPlan& plan) {
  std::string text = "x" + tensor_text(plan.read);
  ParallelState state = plan.read;
  for (std::size_t i = 0; i < form.steps.size(); ++i) {
    const auto& step = plan.steps[i];
    if (step.x != state) text += str(">", tensor_text(step.x));
    text += str(" ", form.steps[i].name);
    if (form.steps[i].kind != Kind::kActivation) text += weight_text(step.weight);
    text += str(" ", step_output(form, i), tensor_text(step.y));
    state = step.y;
  }
  if (plan.join != state) text += str(">", tensor_text(plan.join));
  text += ", back";
  state = plan.grad_read;
  for (std::size_t i = form.steps.size(); i-- > 0;) {
    const auto& step = plan.steps[i];
    text += str(" ", step_output(form, i), tensor_text(state));
    if (step.grad_y != state) text += str(">", tensor_text(step.grad_y));
    if (step.saved_x != step.x)
      text +=
          str(" (", i == 0 ? "x" : step_output(form, i - 1), tensor_text(step.x), ">", tensor_text(step.saved_x), ")");
    state = step.grad_x;
  }
  text += str(" x", tensor_text(state));
  if (plan.grad_join != state) text += str(">", tensor_text(plan.grad_join));
  return text;
}

std::string explain(const BypassForm& form, const SiteStates& site, const BypassPlan& plan) {
  std::string text;
  const auto say = [&](const std::string& part) { text += (text.empty() ? "" : "; ") + part; };
  ParallelState state = plan.read;
  for (std::size_t i = 0; i < form.steps.size(); ++i) {
    const auto& step = plan.steps[i];
    const std::string input = i == 0 ? "x" : step_output(form, i - 1);
    if (step.x != state)
      say(moved_words(input, state, step.x));
    else if (i > 0 && state == kPending)
      say(input + " left a sum");
    say(weight_words(form.steps[i], step.weight));
    state = step.y;
  }
  if (state != plan.join) say(moved_words("y", state, plan.join));
  const bool shares = site.y.size() > 1 && plan.join == site.y.front();
  if (shares)
    say("y joins the linear's own sum before its " + own_transition(site.y));
  else if (site.y.size() > 1)
    say("y is added after the linear's " + own_transition(site.y));
  else
    say("y lies as the linear's own output");
  state = plan.grad_read;
  for (std::size_t i = form.steps.size(); i-- > 0;) {
    const auto& step = plan.steps[i];
    if (step.grad_y != state) say(moved_words("grad " + step_output(form, i), state, step.grad_y));
    if (step.saved_x != step.x)
      say(moved_words(i == 0 ? "x" : step_output(form, i - 1), step.x, step.saved_x) + " for the backward");
    state = step.grad_x;
  }
  if (state != plan.grad_join) say(moved_words("grad x", state, plan.grad_join));
  if (site.grad_x.size() > 1 && plan.grad_join == site.grad_x.front())
    say("grad x joins the linear's own sum before its " + own_transition(site.grad_x));
  for (std::size_t i = 0; i < form.steps.size(); ++i) {
    const auto& step = plan.steps[i];
    const Transition sum{step.grad_weight, step.weight};
    if (form.steps[i].kind != Kind::kActivation && sum.collective())
      say("grad " + form.steps[i].name + " by " + std::string(transition_name(sum.kind())) + " once an optimizer step");
  }
  return text;
}

}  // namespace flexcore
