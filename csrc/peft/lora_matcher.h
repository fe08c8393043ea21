#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "flexcore/config.h"

namespace flexcore {

/// What an adapter does to one linear.
struct ResolvedLora {
  std::int64_t rank = 0;
  double alpha = 0.0;
  double scaling = 0.0;  // alpha / rank, or alpha / sqrt(rank) with use_rslora
};

/// Which linears a LoraConfig targets, by PEFT's rules: a name of the list is the whole path or its end at a dot; a
/// regular expression matches the whole path; "all-linear" is every linear but the output layer, lm_head. Ranks and
/// alphas come from the first pattern that matches the end of the path at a dot.
class LoraMatcher {
 public:
  static constexpr std::int64_t kMaxRank = 256;

  /// Throws InvalidArgument for ranks that are not 1 to kMaxRank, numbers that are not finite, and regular expressions
  /// that cannot be used, by name.
  explicit LoraMatcher(const LoraConfig& config);
  LoraMatcher(LoraMatcher&&) noexcept;
  LoraMatcher& operator=(LoraMatcher&&) noexcept;
  ~LoraMatcher();

  /// `module_path` names a linear, as "model.layers.0.self_attn.q_proj". Empty: not targeted.
  std::optional<ResolvedLora> resolve(std::string_view module_path) const;

  /// Whether each name of target_modules matches one of `module_paths`, all linears there are. Throws Unsupported for
  /// the embedding and the output layer, InvalidArgument for any other name that does not.
  void require_targets(std::span<const std::string> module_paths) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// One look-up; for many, keep a LoraMatcher.
std::optional<ResolvedLora> resolve_lora(const LoraConfig& config, std::string_view module_path);

}  // namespace flexcore
