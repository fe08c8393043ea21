#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "../interpreter.h"
#include "flexcore/ops.h"

/// Python arguments to views, and the call itself. Every refusal is an InvalidArgument (of a device that nobody here
/// knows: Unsupported) that names the op, the argument, what came and what was wanted.
namespace flexcore::python {

namespace nb = nanobind;

/// One call of one op: holds the arrays that were read for as long as it lives, and runs the op without the GIL, on the
/// device where all of them are.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  TensorView read(nb::handle array, const char* name);
  TensorView write(nb::handle array, const char* name);           // refuses read-only arrays
  TensorView read_optional(nb::handle array, const char* name);   // None: not given
  TensorView write_optional(nb::handle array, const char* name);  // None: not wanted
  /// Of an array that says how others are laid out: wherever it is, the view is of the host's memory.
  TensorView read_on_host(nb::handle array, const char* name);
  TensorView read_on_host_optional(nb::handle array, const char* name);

  double number(nb::handle value, const char* name) const;
  std::int64_t integer(nb::handle value, const char* name) const;
  std::uint64_t unsigned_integer(nb::handle value, const char* name) const;

  /// body(runtime), one call at a time in the process.
  template <class Body>
  void run(Body&& body) const {
    const python::Released released;
    const std::lock_guard lock(runtime_mutex());
    ops::Runtime& runtime = shared_runtime(device_);
    runtime.synchronously([&] { body(runtime); });
  }

  [[noreturn]] void refuse(nb::handle got, const char* name, const char* wanted) const;

 private:
  using Array = nb::ndarray<nb::ro>;

  struct Placed {
    TensorView view;
    Device device;
  };
  Placed import(nb::handle array, const char* name);
  Placed place(Array array, bool as_bfloat16, const char* name);
  /// The view of an array that must be where the others are.
  TensorView beside_others(const Placed& placed, const char* name);
  std::string label(const char* name) const { return std::string(op_) + ": " + name; }

  static std::mutex& runtime_mutex();
  static ops::Runtime& shared_runtime(Device device);
  friend void set_num_threads(int);
  friend int num_threads();

  const char* op_;
  std::vector<Array> arrays_;
  Device device_;
  const char* first_ = nullptr;                     // the argument that decided on the device
  std::deque<std::vector<std::byte>> host_copies_;  // of arrays that are read on the host
};

/// An argument that takes anything, None too: what is wrong with it is told by Call, by name. Python objects whose name
/// a view takes over carry a trailing underscore.
inline auto operator""_object(const char* name, std::size_t) { return nb::arg(name).none(); }

void set_num_threads(int num_threads);
int num_threads();

void register_errors(nb::module_& m);
void register_linear(nb::module_& m);
void register_elementwise(nb::module_& m);
void register_attention(nb::module_& m);
void register_training(nb::module_& m);

}  // namespace flexcore::python
