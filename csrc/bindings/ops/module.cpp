#include "call.h"

NB_MODULE(_ops, m) {
  using namespace flexcore::python;
  m.doc() = "The engine's kernels on DLPack arrays; outputs are arguments. flexcore.ops is the form to use.";
  register_errors(m);
  m.def("set_num_threads", &set_num_threads, nanobind::arg("num_threads"),
        nanobind::call_guard<flexcore::python::Released>());
  m.def("num_threads", &num_threads, nanobind::call_guard<flexcore::python::Released>());
  register_linear(m);
  register_elementwise(m);
  register_attention(m);
  register_training(m);
}
