#include "core/json_fields.h"

#include <utility>

#include "core/number.h"

namespace flexcore {

JsonFields::JsonFields(const Json& json, std::string source) : json_(json), source_(std::move(source)) {
  if (!json.is_object()) throw ModelLoadError(str(source_, ": ", json.describe(), ", wanted an object"));
}

const Json* JsonFields::find(const std::string& name) const {
  const Json* value = json_.find(name);
  return value == nullptr || value->is_null() ? nullptr : value;
}

std::int64_t JsonFields::integer(const std::string& name, std::int64_t low, std::int64_t high) const {
  const Json* value = find(name);
  if (value == nullptr || !value->is_int() || value->as_int() < low || value->as_int() > high)
    fail(name, value, str("an integer in [", low, ", ", high, "]"));
  return value->as_int();
}

std::int64_t JsonFields::integer_or(const std::string& name, std::int64_t fallback, std::int64_t low) const {
  return find(name) == nullptr ? fallback : integer(name, low);
}

double JsonFields::number(const std::string& name) const {
  const Json* value = find(name);
  if (value == nullptr || !value->is_number()) fail(name, value, "a number");
  return value->as_double();
}

double JsonFields::number_or(const std::string& name, double fallback) const {
  return find(name) == nullptr ? fallback : number(name);
}

double JsonFields::positive(const std::string& name) const {
  const Json* value = find(name);
  const double number = value != nullptr && value->is_number() ? value->as_double() : 0.0;
  if (!(static_cast<float>(number) > 0.0f) || !fits_float(number))
    fail(name, value, "a number above 0, as float32 too");
  return number;
}

double JsonFields::positive_or(const std::string& name, double fallback) const {
  return find(name) == nullptr ? fallback : positive(name);
}

bool JsonFields::boolean_or(const std::string& name, bool fallback) const {
  const Json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_bool()) fail(name, value, "true or false");
  return value->as_bool();
}

std::string JsonFields::string_or(const std::string& name, const std::string& fallback) const {
  const Json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_string()) fail(name, value, "a string");
  return value->as_string();
}

}  // namespace flexcore
