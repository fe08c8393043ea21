#include "peft/module_matcher.h"

#include <algorithm>
#include <regex>
#include <utility>

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

}  // namespace

bool is_suffix(std::string_view path, std::string_view name) {
  return path == name ||
         (path.size() > name.size() && path.ends_with(name) && path[path.size() - name.size() - 1] == '.');
}

struct PathPattern::Impl {
  std::regex regex;
};

PathPattern::PathPattern(const char* option, const std::string& pattern, const std::string& expression) {
  const std::size_t count = repeats(pattern);
  require(count <= kMaxRepeats && expression.size() * count <= kMaxStates, option, ": regular expression \"",
          pattern.substr(0, 200), "\" is too large");
  try {
    impl_ = std::make_unique<Impl>(Impl{std::regex(expression, kRegexFlags)});
  } catch (const std::regex_error& error) {
    throw InvalidArgument(str(option, ": regular expression \"", pattern, "\": ", error.what()));
  }
}
PathPattern::PathPattern(PathPattern&&) noexcept = default;
PathPattern& PathPattern::operator=(PathPattern&&) noexcept = default;
PathPattern::~PathPattern() = default;

bool PathPattern::matches(std::string_view path) const {
  require(path.size() <= kMaxPath, "module path of ", path.size(), " characters, wanted at most ", kMaxPath);
  return std::regex_match(path.begin(), path.end(), impl_->regex);
}

ModuleMatcher::ModuleMatcher(const char* option, std::vector<std::string> names, bool is_regex)
    : option_(option),
      names_(std::move(names)),
      all_linear_(!is_regex && names_ == std::vector<std::string>{"all-linear"}) {
  if (!is_regex) return;
  require(names_.size() == 1, option, ": ", names_.size(), " regular expressions, wanted one");
  regex_.emplace_back(option, names_[0], names_[0]);
}

bool ModuleMatcher::targets(std::string_view path) const {
  require(path.size() <= kMaxPath, "module path of ", path.size(), " characters, wanted at most ", kMaxPath);
  if (!regex_.empty()) return regex_[0].matches(path);
  if (all_linear_) return !is_suffix(path, "lm_head") && !is_suffix(path, "embed_tokens");
  return std::any_of(names_.begin(), names_.end(), [&](auto& name) { return is_suffix(path, name); });
}

void ModuleMatcher::require_targets(std::span<const std::string> module_paths) const {
  const auto any = [&](auto&& test) { return std::any_of(module_paths.begin(), module_paths.end(), test); };
  if (!regex_.empty() || all_linear_) {
    require(any([&](const std::string& path) { return targets(path); }), option_, ": \"", names_[0],
            "\" matches no linear of the model");
    return;
  }
  require(!names_.empty(), option_, ": empty, wanted at least one name");
  for (const auto& name : names_) {
    if (any([&](const std::string& path) { return is_suffix(path, name); })) continue;
    require<Unsupported>(!is_suffix(name, "lm_head") && !is_suffix(name, "embed_tokens"), option_, ": \"", name,
                         "\": the embedding and the output layer take LoRA, no other adapter");
    throw InvalidArgument(
        str(option_, ": \"", name, "\" matches no linear of the model, wanted ", names_of(module_paths)));
  }
}

}  // namespace flexcore
