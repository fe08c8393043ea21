#include "flexcore/plan.h"

#include <pybind11/stl.h>

#include "record.h"
#include "register.h"

namespace flexcore::python {

void register_plan(py::module_& m) {
  Report<PlannedTensor>(m, "PlannedTensor", "What the compiler decided for one forward tensor that the backward reads.")
      .field("name", &PlannedTensor::name)
      .field("choice", &PlannedTensor::choice)
      .field("reason", &PlannedTensor::reason)
      .field("bytes_per_token", &PlannedTensor::bytes_per_token)
      .done();
  Report<MemoryPlan>(m, "MemoryPlan", "Bytes before any allocation; str() is a table.")
      .field("weights", &MemoryPlan::weights)
      .field("kv_pages", &MemoryPlan::kv_pages)
      .field("saved_activations", &MemoryPlan::saved_activations)
      .field("adapters", &MemoryPlan::adapters)
      .field("gradients", &MemoryPlan::gradients)
      .field("optimizer", &MemoryPlan::optimizer)
      .field("workspace", &MemoryPlan::workspace)
      .property("total", [](const MemoryPlan& self) -> py::object { return py::int_(self.total()); })
      .field("num_layers", &MemoryPlan::num_layers)
      .field("sequence_length", &MemoryPlan::sequence_length)
      .field("tokens_in_flight", &MemoryPlan::tokens_in_flight)
      .field("saved_bytes_per_token_per_layer", &MemoryPlan::saved_bytes_per_token_per_layer)
      .field("unpruned_bytes_per_token_per_layer", &MemoryPlan::unpruned_bytes_per_token_per_layer)
      .field("tensors", &MemoryPlan::tensors)
      .done()
      .def("describe", &MemoryPlan::describe)
      .def("__str__", &MemoryPlan::describe);

  m.def(
      "plan",
      [](const py::object& model, const py::object& config, const py::object& adapter, const py::object& sequence_length) {
        const std::string path = to_path(model, "plan: model");
        const auto engine = convert<std::optional<EngineConfig>>(config, "plan: config").value_or(EngineConfig{});
        const auto method = convert<std::optional<AdapterConfig>>(adapter, "plan: lora");
        const std::int64_t length = to_int64(sequence_length, "plan: sequence_length");
        const py::gil_scoped_release release;
        return plan(path, engine, method, length);
      },
      py::arg("model"), py::arg("config") = py::none(), py::arg("lora") = py::none(), py::arg("sequence_length") = 1024,
      "The memory table of an engine on `model`, finetuning with `lora`, the configuration of an adapter of any method, without loading weights.");
}

}  // namespace flexcore::python
