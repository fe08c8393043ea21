#include <exception>
#include <new>

#include "call.h"

namespace flexcore::python {
namespace {

// The classes are those of flexcore._core, so that one `except` serves both modules. Held for ever, like the modules.
struct Classes {
  PyObject *error, *invalid, *unsupported, *memory, *device;
};

Classes& classes() {
  static Classes all{};
  return all;
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const InvalidArgument& e) {
    PyErr_SetString(classes().invalid, e.what());
  } catch (const Unsupported& e) {
    PyErr_SetString(classes().unsupported, e.what());
  } catch (const OutOfMemory& e) {
    PyErr_SetString(classes().memory, e.what());
  } catch (const DeviceError& e) {
    PyErr_SetString(classes().device, e.what());
  } catch (const Error& e) {
    PyErr_SetString(classes().error, e.what());
  } catch (const std::bad_alloc&) {
    PyErr_SetString(classes().memory, "the process is out of memory");
  }
}

}  // namespace

void register_errors(nb::module_&) {
  const nb::module_ core = nb::module_::import_("flexcore._core");
  const auto take = [&](const char* name) { return nb::object(core.attr(name)).release().ptr(); };
  classes() = {take("Error"), take("InvalidArgument"), take("Unsupported"), take("OutOfMemory"), take("DeviceError")};
  nb::register_exception_translator(translate);
}

}  // namespace flexcore::python
