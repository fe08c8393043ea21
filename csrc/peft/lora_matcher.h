#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "flexcore/config.h"
#include "peft/module_matcher.h"

namespace flexcore {

/// What an adapter does to one linear.
struct ResolvedLora {
  std::int64_t rank = 0;
  double alpha = 0.0;
  double scaling = 0.0;  // alpha / rank, or alpha / sqrt(rank) with use_rslora
};

/// Which linears a LoraConfig targets. Ranks and alphas come from the first pattern that matches the end of the path at
/// a dot.
class LoraMatcher {
 public:
  static constexpr std::int64_t kMaxRank = 256;

  /// Throws InvalidArgument for ranks that are not 1 to kMaxRank, numbers that are not finite or not a probability, and
  /// regular expressions that cannot be used, by name.
  explicit LoraMatcher(const LoraConfig& config);

  /// `module_path` names a linear, as "model.layers.0.self_attn.q_proj". Empty: not targeted.
  std::optional<ResolvedLora> resolve(std::string_view module_path) const;
  const ModuleMatcher& modules() const { return modules_; }

 private:
  LoraConfig config_;
  ModuleMatcher modules_;
  std::vector<std::pair<PathPattern, std::int64_t>> ranks_;
  std::vector<std::pair<PathPattern, double>> alphas_;
};

/// One look-up; for many, keep a LoraMatcher.
std::optional<ResolvedLora> resolve_lora(const LoraConfig& config, std::string_view module_path);

}  // namespace flexcore
