#include "register.h"

PYBIND11_MODULE(_core, m) {
  using namespace flexcore::python;
  m.doc() = "The flexcore engine: serving and finetuning on one copy of the weights.";
  m.attr("__version__") = FLEXCORE_VERSION;
  register_errors(m);
  register_config(m);
  register_reports(m);
  register_engine(m);
  register_plan(m);
  register_simulate(m);
}
