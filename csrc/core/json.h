#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace flexcore {

/// One JSON value (RFC 8259). Objects keep the order of their members; integers that fit 64 bits stay integers.
class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  Json() = default;
  Json(std::nullptr_t) {}
  Json(bool value) : value_(value) {}
  Json(int value) : value_(std::int64_t{value}) {}
  Json(std::int64_t value) : value_(value) {}
  Json(double value) : value_(value) {}
  Json(const char* value) : value_(std::string(value)) {}
  Json(std::string value) : value_(std::move(value)) {}
  Json(Array value) : value_(std::move(value)) {}
  Json(Object value) : value_(std::move(value)) {}

  /// Strict: UTF-8 only, no comments, no trailing commas, no NaN, no repeated keys, at most 64 levels.
  /// Throws InvalidArgument with the byte offset of the first mistake.
  static Json parse(std::string_view text);

  /// Text that `parse` turns into the same value; characters outside ASCII are escaped. `indent` 0: one line.
  /// Throws InvalidArgument for what JSON cannot hold: NaN, infinity, strings that are not UTF-8.
  std::string dump(int indent = 0) const;
  std::string describe() const;  // dump, cut short, for messages

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  bool is_bool() const { return std::holds_alternative<bool>(value_); }
  bool is_int() const { return std::holds_alternative<std::int64_t>(value_); }
  bool is_number() const { return is_int() || std::holds_alternative<double>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }

  // Each throws InvalidArgument when the value is of another kind.
  bool as_bool() const;
  std::int64_t as_int() const;
  double as_double() const;  // integers too
  const std::string& as_string() const&;
  const Array& as_array() const&;
  const Object& as_object() const&;
  // A value that is about to go gives a copy, so that loops over it are safe.
  std::string as_string() && { return std::as_const(*this).as_string(); }
  Array as_array() && { return std::as_const(*this).as_array(); }
  Object as_object() && { return std::as_const(*this).as_object(); }

  /// The member of an object, or null when the key is absent or this is no object.
  const Json* find(std::string_view key) const;

  bool operator==(const Json&) const = default;

 private:
  template <class T>
  const T& get(const char* wanted) const;

  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value_ = nullptr;
};

/// Parses a file. Throws ModelLoadError that names the file.
Json load_json(const std::string& path);

}  // namespace flexcore
