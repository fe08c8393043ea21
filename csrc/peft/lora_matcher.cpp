#include "peft/lora_matcher.h"

#include <algorithm>
#include <cmath>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"

namespace flexcore {

namespace {

// Patterns come with adapters, so from anyone. A match may take neither exponential time (libstdc++ has an executor
// without back-tracking) nor deep recursion: its depth is the number of states, which is at most length times repeats.
constexpr std::size_t kMaxPath = 1024;
constexpr std::size_t kMaxStates = 20000;
constexpr std::size_t kMaxRepeats = 100;

// Only libstdc++ has it; elsewhere this must not compile.
constexpr auto kRegexFlags = std::regex::ECMAScript | std::regex_constants::__polynomial;

/// Product of the counts in {n} and {n,m}: what the compiler multiplies the pattern by.
std::size_t repeats(const std::string& pattern) {
  std::size_t product = 1;
  for (std::size_t i = 0; i < pattern.size() && product <= kMaxRepeats; ++i) {
    if (pattern[i] != '{') continue;
    std::size_t largest = 1, count = 0;
    for (++i; i < pattern.size() && pattern[i] != '}'; ++i) {
      count = pattern[i] >= '0' && pattern[i] <= '9' ? std::min(count * 10 + (pattern[i] - '0'), kMaxRepeats + 1) : 0;
      largest = std::max(largest, count);
    }
    product *= largest;
  }
  return product;
}

std::regex compile(const char* option, const std::string& pattern, const std::string& expression) {
  const std::size_t count = repeats(pattern);
  require(count <= kMaxRepeats && expression.size() * count <= kMaxStates, option, ": regular expression \"",
          pattern.substr(0, 200), "\" is too large");
  try {
    return std::regex(expression, kRegexFlags);
  } catch (const std::regex_error& error) {
    throw InvalidArgument(str(option, ": regular expression \"", pattern, "\": ", error.what()));
  }
}

bool matches(std::string_view path, const std::regex& expression) {
  return std::regex_match(path.begin(), path.end(), expression);
}

/// `name` is the path or what follows one of its dots.
bool is_suffix(std::string_view path, std::string_view name) {
  return path == name ||
         (path.size() > name.size() && path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

template <class Value>
using Patterns = std::vector<std::pair<std::regex, Value>>;

template <class Value>
Patterns<Value> compile_all(const char* option, const std::vector<std::pair<std::string, Value>>& patterns) {
  Patterns<Value> result;
  for (const auto& [pattern, value] : patterns)
    result.emplace_back(compile(option, pattern, str("(.*\\.)?(", pattern, ")")), value);
  return result;
}

template <class Value>
Value first_match(const Patterns<Value>& patterns, std::string_view path, Value fallback) {
  const auto found = std::find_if(patterns.begin(), patterns.end(), [&](auto& p) { return matches(path, p.first); });
  return found == patterns.end() ? fallback : found->second;
}

}  // namespace

struct LoraMatcher::Impl {
  explicit Impl(const LoraConfig& c) : config(c) {
    require(c.r >= 1, "r: ", c.r, ", wanted at least 1");
    require(std::isfinite(c.lora_alpha), "lora_alpha: ", c.lora_alpha, ", wanted a finite number");
    for (const auto& [pattern, rank] : c.rank_pattern)
      require(rank >= 1, "rank_pattern: ", pattern, ": ", rank, ", wanted at least 1");
    for (const auto& [pattern, alpha] : c.alpha_pattern)
      require(std::isfinite(alpha), "alpha_pattern: ", pattern, ": ", alpha, ", wanted a finite number");
    ranks = compile_all("rank_pattern", c.rank_pattern);
    alphas = compile_all("alpha_pattern", c.alpha_pattern);
    if (c.target_modules_is_regex) {
      require(c.target_modules.size() == 1, "target_modules: ", c.target_modules.size(),
              " regular expressions, wanted one");
      target = compile("target_modules", c.target_modules[0], c.target_modules[0]);
    }
    all_linear = !c.target_modules_is_regex && c.target_modules == std::vector<std::string>{"all-linear"};
  }

  bool targets(std::string_view path) const {
    if (config.target_modules_is_regex) return matches(path, target);
    if (all_linear) return !is_suffix(path, "lm_head");
    return std::any_of(config.target_modules.begin(), config.target_modules.end(),
                       [&](auto& name) { return is_suffix(path, name); });
  }

  LoraConfig config;
  Patterns<std::int64_t> ranks;
  Patterns<double> alphas;
  std::regex target;
  bool all_linear = false;
};

LoraMatcher::LoraMatcher(const LoraConfig& config) : impl_(std::make_unique<Impl>(config)) {}
LoraMatcher::LoraMatcher(LoraMatcher&&) noexcept = default;
LoraMatcher& LoraMatcher::operator=(LoraMatcher&&) noexcept = default;
LoraMatcher::~LoraMatcher() = default;

std::optional<ResolvedLora> LoraMatcher::resolve(std::string_view module_path) const {
  require(module_path.size() <= kMaxPath, "module path of ", module_path.size(), " characters, wanted at most ",
          kMaxPath);
  if (!impl_->targets(module_path)) return std::nullopt;
  const LoraConfig& config = impl_->config;
  ResolvedLora lora;
  lora.rank = first_match(impl_->ranks, module_path, config.r);
  lora.alpha = first_match(impl_->alphas, module_path, config.lora_alpha);
  const auto rank = static_cast<double>(lora.rank);
  lora.scaling = lora.alpha / (config.use_rslora ? std::sqrt(rank) : rank);
  return lora;
}

std::optional<ResolvedLora> resolve_lora(const LoraConfig& config, std::string_view module_path) {
  return LoraMatcher(config).resolve(module_path);
}

}  // namespace flexcore
