#include <algorithm>
#include <limits>

#include "sched/policy.h"

namespace flexcore {
namespace {

/// Every step is filled with finetuning up to a fixed number of tokens, whatever that takes: what FlexLLM's released
/// code does with 256 (by reading). Backward counts as much as forward: so many tokens through all layers.
class TokenCap final : public Policy {
 public:
  explicit TokenCap(std::int64_t tokens) : tokens_(tokens) {}
  Allowance allowance(const Load& load) override {
    return {.step_ms = std::numeric_limits<double>::infinity(),
            .tokens = std::max<std::int64_t>(0, tokens_ - load.inference_rows)};
  }

 private:
  std::int64_t tokens_;
};

}  // namespace

std::unique_ptr<Policy> token_cap_policy(std::int64_t tokens) { return std::make_unique<TokenCap>(tokens); }

}  // namespace flexcore
