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

/// The last parts of the paths, each once: "q_proj", "k_proj", ...
std::string names_of(std::span<const std::string> paths) {
  std::vector<std::string> names;
  for (const auto& path : paths) {
    const std::string name = path.substr(path.rfind('.') + 1);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "\"" : ", \"") + name + "\"";
  return text;
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
    require(c.r >= 1 && c.r <= kMaxRank, "r: ", c.r, ", wanted 1 to ", kMaxRank);
    require(std::isfinite(c.lora_alpha), "lora_alpha: ", c.lora_alpha, ", wanted a finite number");
    for (const auto& [pattern, rank] : c.rank_pattern)
      require(rank >= 1 && rank <= kMaxRank, "rank_pattern: ", pattern, ": ", rank, ", wanted 1 to ", kMaxRank);
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

void LoraMatcher::require_targets(std::span<const std::string> module_paths) const {
  const auto any = [&](auto&& test) { return std::any_of(module_paths.begin(), module_paths.end(), test); };
  if (impl_->config.target_modules_is_regex || impl_->all_linear) {
    require(any([&](const std::string& path) { return impl_->targets(path); }), "target_modules: \"",
            impl_->config.target_modules[0], "\" matches no linear of the model");
    return;
  }
  require(!impl_->config.target_modules.empty(), "target_modules: empty, wanted at least one name");
  for (const auto& name : impl_->config.target_modules) {
    if (any([&](const std::string& path) { return is_suffix(path, name); })) continue;
    require<Unsupported>(!is_suffix(name, "lm_head") && !is_suffix(name, "embed_tokens"), "target_modules: \"", name,
                         "\": only linears of the layers take an adapter, not the embedding or the output layer");
    throw InvalidArgument(
        str("target_modules: \"", name, "\" matches no linear of the model, wanted ", names_of(module_paths)));
  }
}

std::optional<ResolvedLora> resolve_lora(const LoraConfig& config, std::string_view module_path) {
  return LoraMatcher(config).resolve(module_path);
}

}  // namespace flexcore
