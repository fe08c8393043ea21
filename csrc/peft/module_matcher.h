#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flexcore {

/// One regular expression of those that PEFT's files hold. They come from anyone: a match takes neither exponential
/// time nor deep recursion.
class PathPattern {
 public:
  /// `expression`: the one to match, made of `pattern`. Throws InvalidArgument that names option and pattern.
  PathPattern(const char* option, const std::string& pattern, const std::string& expression);
  PathPattern(PathPattern&&) noexcept;
  PathPattern& operator=(PathPattern&&) noexcept;
  ~PathPattern();
  bool matches(std::string_view path) const;  // all of it

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// `name` is the path, or what follows one of its dots.
bool is_suffix(std::string_view path, std::string_view name);

/// Which modules a list like target_modules names, by PEFT's rules: a name of the list is the whole path or its end at
/// a dot; a regular expression matches the whole path; "all-linear" is every linear but the output layer, lm_head, and
/// no embedding.
class ModuleMatcher {
 public:
  /// `option` begins messages. Throws InvalidArgument for a regular expression that cannot be used.
  ModuleMatcher(const char* option, std::vector<std::string> names, bool is_regex);

  bool targets(std::string_view module_path) const;
  /// Whether each name matches one of `module_paths`, all that the method can adapt. Throws Unsupported for an
  /// embedding or output layer that is none of them, InvalidArgument for any other name that does not.
  void require_targets(std::span<const std::string> module_paths) const;

 private:
  const char* option_;
  std::vector<std::string> names_;
  std::vector<PathPattern> regex_;  // one, or none
  bool all_linear_;
};

}  // namespace flexcore
