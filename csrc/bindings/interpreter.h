#pragma once

#include <Python.h>

#include <chrono>
#include <string>
#include <thread>

// What both Python modules do with the interpreter itself.
namespace flexcore::python {

/// Other Python threads go on during its lifetime. A thread that comes back while the interpreter ends stays here, as
/// it does from Python 3.14 on; before, taking the GIL would end the thread in the midst of C++.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() noexcept(false) {
    while (is_finalizing()) std::this_thread::sleep_for(std::chrono::hours(1));
    PyEval_RestoreThread(state_);
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  static bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030d0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }
  PyThreadState* state_;
};

/// At most that many bytes, and three dots where there were more; a character is whole, or not there.
inline std::string shortened(std::string text, std::size_t most) {
  if (text.size() <= most) return text;
  while (most > 0 && (static_cast<unsigned char>(text[most]) & 0xc0) == 0x80) --most;
  return text.substr(0, most) + "...";
}

}  // namespace flexcore::python
