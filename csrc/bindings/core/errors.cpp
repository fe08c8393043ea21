#include <pybind11/pybind11.h>

#include "flexcore/error.h"
#include "register.h"

namespace flexcore::python {
namespace {

namespace py = pybind11;

// Owned by the module and by the translator below; the interpreter ends before either goes.
PyObject* make(py::module_& m, const char* name, const char* doc, const py::object& bases) {
  PyObject* type = PyErr_NewExceptionWithDoc((std::string("flexcore.") + name).c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.attr(name) = py::handle(type);
  return type;
}

}  // namespace

void register_errors(py::module_& m) {
  static PyObject* error =
      make(m, "Error", "Base of everything flexcore raises.", py::handle(PyExc_RuntimeError).cast<py::object>());
  const auto with = [](PyObject* base) { return py::make_tuple(py::handle(error), py::handle(base)); };
  const auto alone = py::make_tuple(py::handle(error));
  static PyObject* invalid =
      make(m, "InvalidArgument", "The caller passed something that no engine could accept.", with(PyExc_ValueError));
  static PyObject* unsupported =
      make(m, "Unsupported", "The request is meaningful, but this build, model or device cannot do it.", alone);
  static PyObject* memory =
      make(m, "OutOfMemory", "A memory pool is too small; the text holds the ledger.", with(PyExc_MemoryError));
  static PyObject* device = make(m, "DeviceError", "A device or its driver failed.", alone);
  static PyObject* load =
      make(m, "ModelLoadError", "A model directory, weight file or adapter could not be read.", alone);

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const InvalidArgument& e) {
      PyErr_SetString(invalid, e.what());
    } catch (const Unsupported& e) {
      PyErr_SetString(unsupported, e.what());
    } catch (const OutOfMemory& e) {
      PyErr_SetString(memory, e.what());
    } catch (const DeviceError& e) {
      PyErr_SetString(device, e.what());
    } catch (const ModelLoadError& e) {
      PyErr_SetString(load, e.what());
    } catch (const Error& e) {
      PyErr_SetString(error, e.what());
    } catch (const std::bad_alloc&) {
      PyErr_SetString(memory, "the process is out of memory");
    }
  });
}

}  // namespace flexcore::python
