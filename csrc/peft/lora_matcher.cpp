#include "peft/lora_matcher.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/check.h"
#include "core/number.h"

namespace flexcore {

namespace {

template <class Value>
std::vector<std::pair<PathPattern, Value>> compile_all(const char* option,
                                                       const std::vector<std::pair<std::string, Value>>& patterns) {
  std::vector<std::pair<PathPattern, Value>> result;
  for (const auto& [pattern, value] : patterns)
    result.emplace_back(PathPattern(option, pattern, str("(.*\\.)?(", pattern, ")")), value);
  return result;
}

template <class Value>
Value first_match(const std::vector<std::pair<PathPattern, Value>>& patterns, std::string_view path, Value fallback) {
  const auto found =
      std::find_if(patterns.begin(), patterns.end(), [&](auto& pattern) { return pattern.first.matches(path); });
  return found == patterns.end() ? fallback : found->second;
}

}  // namespace

LoraMatcher::LoraMatcher(const LoraConfig& c)
    : config_(c), modules_("target_modules", c.target_modules, c.target_modules_is_regex) {
  require(c.r >= 1 && c.r <= kMaxRank, "r: ", c.r, ", wanted 1 to ", kMaxRank);
  require(fits_float(c.lora_alpha), "lora_alpha: ", c.lora_alpha, ", wanted finite as float32");
  require(c.lora_dropout >= 0.0 && c.lora_dropout < 1.0, "lora_dropout: ", c.lora_dropout, ", wanted in [0, 1)");
  for (const auto& [pattern, rank] : c.rank_pattern)
    require(rank >= 1 && rank <= kMaxRank, "rank_pattern: ", pattern, ": ", rank, ", wanted 1 to ", kMaxRank);
  for (const auto& [pattern, alpha] : c.alpha_pattern)
    require(fits_float(alpha), "alpha_pattern: ", pattern, ": ", alpha, ", wanted finite as float32");
  ranks_ = compile_all("rank_pattern", c.rank_pattern);
  alphas_ = compile_all("alpha_pattern", c.alpha_pattern);
}

std::optional<ResolvedLora> LoraMatcher::resolve(std::string_view module_path) const {
  if (!modules_.targets(module_path)) return std::nullopt;
  ResolvedLora lora;
  lora.rank = first_match(ranks_, module_path, config_.r);
  lora.alpha = first_match(alphas_, module_path, config_.lora_alpha);
  const auto rank = static_cast<double>(lora.rank);
  lora.scaling = lora.alpha / (config_.use_rslora ? std::sqrt(rank) : rank);
  return lora;
}

std::optional<ResolvedLora> resolve_lora(const LoraConfig& config, std::string_view module_path) {
  return LoraMatcher(config).resolve(module_path);
}

}  // namespace flexcore
