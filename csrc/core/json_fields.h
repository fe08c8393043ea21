#pragma once

#include <limits>
#include <string>

#include "core/check.h"
#include "core/json.h"

namespace flexcore {

/// Reads the members of one object; what is wrong becomes an error that names the source, the member, what came and
/// what was wanted. A member that is null counts as absent.
class JsonFields {
 public:
  static constexpr std::int64_t kMaxInteger = std::numeric_limits<std::int32_t>::max();

  /// `json` must outlive this. `source` begins every message.
  JsonFields(const Json& json, std::string source);
  JsonFields(Json&& json, std::string source) = delete;

  /// Null when absent.
  const Json* find(const std::string& name) const;

  std::int64_t integer(const std::string& name, std::int64_t low, std::int64_t high = kMaxInteger) const;
  std::int64_t integer_or(const std::string& name, std::int64_t fallback, std::int64_t low) const;
  double number(const std::string& name) const;
  double number_or(const std::string& name, double fallback) const;
  double positive(const std::string& name) const;
  double positive_or(const std::string& name, double fallback) const;
  bool boolean_or(const std::string& name, bool fallback) const;
  std::string string_or(const std::string& name, const std::string& fallback) const;

  template <class E = ModelLoadError>
  [[noreturn]] void fail(const std::string& name, const Json* got, const std::string& wanted) const {
    throw E(str(source_, ": ", name, ": ", got == nullptr ? "missing" : "got " + got->describe(), ", wanted ", wanted));
  }
  const std::string& source() const { return source_; }

 private:
  const Json& json_;
  std::string source_;
};

}  // namespace flexcore
