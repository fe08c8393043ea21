#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "flexcore/config.h"

namespace flexcore::python {

/// SamplingParams with what text-level callers add: `stop` is applied by flexcore.LLM, which sees text.
struct TextSamplingParams : SamplingParams {
  std::vector<std::string> stop;
};

void register_errors(pybind11::module_& m);
void register_config(pybind11::module_& m);
void register_reports(pybind11::module_& m);  // what engine.h returns
void register_engine(pybind11::module_& m);
void register_plan(pybind11::module_& m);
void register_simulate(pybind11::module_& m);

}  // namespace flexcore::python
