#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "flexcore/config.h"

/// Python values to C++ and back. Every refusal is an InvalidArgument that names the argument, what came and what was
/// wanted.
namespace flexcore::python {

namespace py = pybind11;

/// "where: got 'abc' (str), wanted an int".
[[noreturn]] void refuse(const std::string& where, py::handle got, const std::string& wanted);

std::int64_t to_int64(py::handle value, const std::string& where);
std::uint64_t to_uint64(py::handle value, const std::string& where);
std::int32_t to_int32(py::handle value, const std::string& where);
double to_double(py::handle value, const std::string& where);
bool to_bool(py::handle value, const std::string& where);
std::string to_string(py::handle value, const std::string& where);
std::string to_path(py::handle value, const std::string& where);               // str or os.PathLike
std::string to_name(py::handle value, const std::string& where);               // None is ""
std::vector<std::int32_t> to_ids(py::handle value, const std::string& where);  // sequence or numpy array of ints
std::vector<Example> to_examples(py::handle value, const std::string& where);  // Examples, or dicts with their fields

/// A list, tuple or set to a vector; anything else is refused as not being `wanted`.
template <class F>
auto to_vector(py::handle value, const std::string& where, const char* wanted, F&& item) {
  std::vector<decltype(item(value, where))> out;
  if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value) && !py::isinstance<py::anyset>(value))
    refuse(where, value, wanted);
  const auto copy = py::reinterpret_steal<py::tuple>(PySequence_Tuple(value.ptr()));  // as in to_pairs
  if (!copy) throw py::error_already_set();
  for (const py::handle entry : copy) out.push_back(item(entry, where + "[" + std::to_string(out.size()) + "]"));
  return out;
}

std::vector<std::string> to_strings(py::handle value, const std::string& where);  // one str is a list of one

/// Entries of a dict in its order, keys and values converted by the functions given.
template <class K, class V>
auto to_pairs(py::handle value, const std::string& where, const char* wanted, K&& key, V&& item) {
  if (!py::isinstance<py::dict>(value)) refuse(where, value, wanted);
  std::vector<std::pair<decltype(key(value, where)), decltype(item(value, where))>> out;
  // A copy: a conversion runs code of the value's own, which may change the dict.
  const auto copy = py::reinterpret_steal<py::dict>(PyDict_Copy(value.ptr()));
  for (const auto& [k, v] : copy)
    out.emplace_back(key(k, where), item(v, where + "[" + py::repr(k).template cast<std::string>() + "]"));
  return out;
}

/// Converts to the type of a record's field. Types of the binding's own (SLO) go through their class.
template <class T>
T convert(py::handle value, const std::string& where);

template <class T>
struct is_optional : std::false_type {};
template <class T>
struct is_optional<std::optional<T>> : std::true_type {};

template <class T>
T convert(py::handle value, const std::string& where) {
  if constexpr (is_optional<T>::value) {
    if (value.is_none()) return std::nullopt;
    return convert<typename T::value_type>(value, where);
  } else if constexpr (std::is_same_v<T, bool>) {
    return to_bool(value, where);
  } else if constexpr (std::is_same_v<T, std::uint64_t>) {
    return to_uint64(value, where);
  } else if constexpr (std::is_same_v<T, std::int64_t>) {
    return to_int64(value, where);
  } else if constexpr (std::is_same_v<T, int>) {
    return to_int32(value, where);
  } else if constexpr (std::is_same_v<T, double>) {
    return to_double(value, where);
  } else if constexpr (std::is_same_v<T, std::string>) {
    return to_string(value, where);
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    return to_strings(value, where);
  } else if constexpr (std::is_same_v<T, std::vector<std::int64_t>>) {
    return to_vector(value, where, "a list of ints", to_int64);
  } else if constexpr (std::is_same_v<T, std::map<std::string, double>>) {
    const auto pairs = to_pairs(value, where, "a dict from name to float", to_string, to_double);
    return {pairs.begin(), pairs.end()};
  } else if constexpr (std::is_same_v<T, std::vector<std::int32_t>>) {
    return to_ids(value, where);
  } else if constexpr (std::is_same_v<T, std::array<double, 2>>) {
    const auto pair = to_vector(value, where, "a pair of floats", to_double);
    if (pair.size() != 2) refuse(where, value, "a pair of floats");
    return {pair[0], pair[1]};
  } else if constexpr (std::is_same_v<T, std::map<std::int32_t, double>>) {
    const auto pairs = to_pairs(value, where, "a dict from token id to float", to_int32, to_double);
    return {pairs.begin(), pairs.end()};
  } else if constexpr (std::is_same_v<T, std::map<std::string, SLO>>) {
    const auto pairs = to_pairs(value, where, "a dict from name to flexcore.SLO", to_string, convert<SLO>);
    return {pairs.begin(), pairs.end()};
  } else if constexpr (std::is_same_v<T, std::vector<std::pair<std::string, std::int64_t>>>) {
    return to_pairs(value, where, "a dict from module pattern to int", to_string, to_int64);
  } else if constexpr (std::is_same_v<T, std::vector<std::pair<std::string, double>>>) {
    return to_pairs(value, where, "a dict from module pattern to float", to_string, to_double);
  } else if constexpr (std::is_same_v<T, AdapterConfig>) {
    if (py::isinstance<IA3Config>(value)) return value.cast<IA3Config>();
    if (py::isinstance<BottleneckConfig>(value)) return value.cast<BottleneckConfig>();
    if (py::isinstance<PromptTuningConfig>(value)) return value.cast<PromptTuningConfig>();
    if (py::isinstance<PrefixTuningConfig>(value)) return value.cast<PrefixTuningConfig>();
    if (!py::isinstance<LoraConfig>(value))
      refuse(where, value,
             "a flexcore.LoraConfig, IA3Config, BottleneckConfig, PromptTuningConfig or PrefixTuningConfig");
    return value.cast<LoraConfig>();
  } else {
    const std::string wanted = py::type::of<T>().attr("__name__").template cast<std::string>();
    if (!py::isinstance<T>(value)) refuse(where, value, "a flexcore." + wanted);
    return value.cast<T>();
  }
}

/// The way back, for getters.
template <class T>
py::object to_python(const T& value) {
  if constexpr (is_optional<T>::value) {
    return value ? to_python(*value) : py::none();
  } else if constexpr (std::is_same_v<T, std::vector<std::string>> || std::is_same_v<T, std::vector<std::int32_t>> ||
                       std::is_same_v<T, std::vector<std::int64_t>>) {
    py::list out(value.size());
    for (std::size_t i = 0; i < value.size(); ++i) out[i] = py::cast(value[i]);
    return out;
  } else if constexpr (std::is_same_v<T, std::array<double, 2>>) {
    return py::make_tuple(value[0], value[1]);
  } else if constexpr (std::is_same_v<T, std::map<std::int32_t, double>> ||
                       std::is_same_v<T, std::map<std::string, double>> ||
                       std::is_same_v<T, std::map<std::string, SLO>> ||
                       std::is_same_v<T, std::vector<std::pair<std::string, std::int64_t>>> ||
                       std::is_same_v<T, std::vector<std::pair<std::string, double>>>) {
    py::dict out;
    for (const auto& [key, item] : value) out[py::cast(key)] = py::cast(item);
    return out;
  } else {
    return py::cast(value);
  }
}

/// A dict from a map with string keys.
template <class V>
py::dict to_dict(const std::map<std::string, V>& values) {
  py::dict out;
  for (const auto& [key, value] : values) out[py::str(key)] = py::cast(value);
  return out;
}

/// A numpy array that takes over the vector's memory.
py::array_t<float> to_array(std::vector<float> data, const std::vector<std::int64_t>& shape);

}  // namespace flexcore::python
