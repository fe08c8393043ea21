#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "sched/plan.h"

namespace flexcore {

/// What a policy decides from.
struct Load {
  double now_ms = 0.0;
  bool inference = false;           // somebody runs or waits
  bool training = false;            // some job has work
  std::int64_t num_waiting = 0;     // requests that have not begun
  std::int64_t inference_rows = 0;  // of this step
  double limit_ms = 0.0;            // the longest step that keeps the objectives of those who are there
  double idle_ms = 0.0;             // the longest step that an arriving request may have to wait for
};

/// What finetuning may have of a step.
struct Allowance {
  double step_ms = 0.0;                                            // the whole step's predicted time
  std::int64_t tokens = std::numeric_limits<std::int64_t>::max();  // forward, or backward through all layers
  bool floor = false;                                              // a starved job gets a piece in spite of step_ms
};

/// How inference and finetuning share the steps of one engine. One file a policy in policies/. Deterministic, and of
/// one scheduler.
class Policy {
 public:
  virtual ~Policy() = default;
  virtual bool trains() const { return true; }
  /// Whether requests get anything in this step; if not and nothing can be trained, they do.
  virtual bool serves(const Load&) { return true; }
  /// Asked after inference was planned.
  virtual Allowance allowance(const Load& load) = 0;
  virtual void arrived(double /*arrival_ms*/) {}
  /// The step is over; so many training sequences ended in it.
  virtual void stepped(const StepPlan&, std::int64_t /*sequences_done*/) {}
};

/// "hybrid" (the engine's own), "temporal:N", "dynamic-temporal", "token-cap:N", "inference-only", "finetune-only".
/// Throws InvalidArgument.
std::unique_ptr<Policy> make_policy(const std::string& name);

// policies/
std::unique_ptr<Policy> hybrid_policy();
std::unique_ptr<Policy> temporal_policy(std::int64_t frequency);
std::unique_ptr<Policy> dynamic_temporal_policy();
std::unique_ptr<Policy> token_cap_policy(std::int64_t tokens);
std::unique_ptr<Policy> inference_only_policy();
std::unique_ptr<Policy> finetune_only_policy();

}  // namespace flexcore
