#include "convert.h"

#include <cstring>
#include <limits>
#include <memory>

#include "../interpreter.h"
#include "flexcore/error.h"

namespace flexcore::python {
namespace {

constexpr std::size_t kLongestRepr = 60;

// An int, or what stands for one (numpy scalars); bool is almost always a mistake.
bool is_integer(py::handle value) { return PyIndex_Check(value.ptr()) && !PyBool_Check(value.ptr()); }

std::vector<std::int32_t> ids_of_array(const py::array& array, const std::string& where) {
  if (array.ndim() != 1 || (array.dtype().kind() != 'i' && array.dtype().kind() != 'u'))
    throw InvalidArgument(where + ": got a numpy array of dtype " + py::str(array.dtype()).cast<std::string>() +
                          " with " + std::to_string(array.ndim()) + " dimensions, wanted integers in one dimension");
  if (array.dtype().is(py::dtype::of<std::int32_t>())) {
    const auto view = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>(array);
    std::vector<std::int32_t> out(view.size());
    if (!out.empty()) std::memcpy(out.data(), view.data(), out.size() * sizeof(std::int32_t));
    return out;
  }
  const auto view = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>(array);
  const auto* bytes = static_cast<const char*>(static_cast<const void*>(view.data()));
  std::vector<std::int32_t> out(view.size());
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::int64_t id;
    std::memcpy(&id, bytes + i * sizeof id, sizeof id);  // a view of somebody's bytes may lie anywhere
    if (id < std::numeric_limits<std::int32_t>::min() || id > std::numeric_limits<std::int32_t>::max())
      throw InvalidArgument(where + "[" + std::to_string(i) + "]: got " + std::to_string(id) + ", wanted a token id");
    out[i] = static_cast<std::int32_t>(id);
  }
  return out;
}

Example to_example(py::handle value, const std::string& where) {
  if (py::isinstance<Example>(value)) return value.cast<Example>();
  if (!py::isinstance<py::dict>(value)) refuse(where, value, "an Example or a dict with input_ids and labels");
  const auto row = py::reinterpret_borrow<py::dict>(value);
  if (!row.contains("input_ids")) refuse(where, value, "a dict with input_ids and labels");
  Example example;
  example.input_ids = to_ids(row["input_ids"], where + ".input_ids");
  example.labels = row.contains("labels") ? to_ids(row["labels"], where + ".labels") : example.input_ids;
  return example;
}

}  // namespace

void refuse(const std::string& where, py::handle got, const std::string& wanted) {
  const std::string shown = shortened(py::repr(got).cast<std::string>(), kLongestRepr);
  const std::string type = py::type::of(got).attr("__name__").cast<std::string>();
  throw InvalidArgument(where + ": got " + shown + " (" + type + "), wanted " + wanted);
}

std::int64_t to_int64(py::handle value, const std::string& where) {
  if (!is_integer(value)) refuse(where, value, "an int");
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {  // a tensor of several elements has __index__, but cannot answer
    PyErr_Clear();
    refuse(where, value, "an int");
  }
  int overflow = 0;
  const std::int64_t out = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) refuse(where, value, "an int of 64 bits");
  return out;
}

std::uint64_t to_uint64(py::handle value, const std::string& where) {
  if (!is_integer(value)) refuse(where, value, "an int");
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  const std::uint64_t out = index ? PyLong_AsUnsignedLongLong(index.ptr()) : 0;
  if (PyErr_Occurred()) {
    PyErr_Clear();
    refuse(where, value, "an int from 0 to 2**64 - 1");
  }
  return out;
}

std::int32_t to_int32(py::handle value, const std::string& where) {
  const std::int64_t out = to_int64(value, where);
  if (out < std::numeric_limits<std::int32_t>::min() || out > std::numeric_limits<std::int32_t>::max())
    refuse(where, value, "an int of 32 bits");
  return static_cast<std::int32_t>(out);
}

double to_double(py::handle value, const std::string& where) {
  if (PyFloat_Check(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (!PyNumber_Check(value.ptr()) || PyBool_Check(value.ptr())) refuse(where, value, "a float");
  const double out = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    refuse(where, value, "a float");
  }
  return out;
}

bool to_bool(py::handle value, const std::string& where) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  const std::string type = py::type::of(value).attr("__name__").cast<std::string>();
  if (type != "bool_" && type != "bool") refuse(where, value, "a bool");  // numpy's own bool
  return PyObject_IsTrue(value.ptr()) == 1;
}

std::string to_string(py::handle value, const std::string& where) {
  if (!PyUnicode_Check(value.ptr())) refuse(where, value, "a str");
  return value.cast<std::string>();
}

std::string to_path(py::handle value, const std::string& where) {
  if (PyUnicode_Check(value.ptr())) return value.cast<std::string>();
  if (!py::hasattr(value, "__fspath__")) refuse(where, value, "a str or os.PathLike");
  return to_string(value.attr("__fspath__")(), where);
}

std::string to_name(py::handle value, const std::string& where) {
  if (value.is_none()) return {};
  if (!PyUnicode_Check(value.ptr())) refuse(where, value, "a name or None");
  return value.cast<std::string>();
}

std::vector<std::int32_t> to_ids(py::handle value, const std::string& where) {
  if (PyUnicode_Check(value.ptr()) || PyBytes_Check(value.ptr()))
    refuse(where, value, "token ids; flexcore.LLM takes text");
  if (py::isinstance<py::array>(value)) return ids_of_array(py::reinterpret_borrow<py::array>(value), where);
  if (PyDict_Check(value.ptr()) || PyAnySet_Check(value.ptr())) refuse(where, value, "a sequence of token ids");
  // A tuple: an element's own __index__ may change the list that it came in.
  const auto fast = py::reinterpret_steal<py::object>(PySequence_Tuple(value.ptr()));
  if (!fast) {
    PyErr_Clear();
    refuse(where, value, "a sequence of token ids");
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(fast.ptr());
  std::vector<std::int32_t> out;
  out.reserve(static_cast<std::size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PyTuple_GET_ITEM(fast.ptr(), i);
    int overflow = 0;
    const long long id = PyLong_CheckExact(item) ? PyLong_AsLongLongAndOverflow(item, &overflow)
                                                 : to_int64(item, where + "[" + std::to_string(i) + "]");
    if (overflow != 0 || id < std::numeric_limits<std::int32_t>::min() || id > std::numeric_limits<std::int32_t>::max())
      refuse(where + "[" + std::to_string(i) + "]", item, "a token id");
    out.push_back(static_cast<std::int32_t>(id));
  }
  return out;
}

std::vector<std::string> to_strings(py::handle value, const std::string& where) {
  if (PyUnicode_Check(value.ptr())) return {value.cast<std::string>()};
  return to_vector(value, where, "a str or a list of str", to_string);
}

std::vector<Example> to_examples(py::handle value, const std::string& where) {
  return to_vector(value, where, "a list of Examples", to_example);
}

py::array_t<float> to_array(std::vector<float> data, const std::vector<std::int64_t>& shape) {
  auto owner = std::make_unique<std::vector<float>>(std::move(data));
  const float* values = owner->data();
  const py::capsule free_owner(owner.get(), [](void* vector) { delete static_cast<std::vector<float>*>(vector); });
  static_cast<void>(owner.release());  // the capsule's now
  return py::array_t<float>(shape, values, free_owner);
}

}  // namespace flexcore::python
