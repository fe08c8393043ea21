#include "flexcore/plan.h"

#include <pybind11/stl.h>

#include "../interpreter.h"
#include "record.h"
#include "register.h"

namespace flexcore::python {
namespace {

void register_parallel(py::module_& m) {
  Record<ParallelRates>(m, "ParallelRates",
                        "What the devices and links of a tensor-parallel group are taken to do; the defaults are those "
                        "of an H100 SXM.")
      .field("flops_per_second", &ParallelRates::flops_per_second)
      .field("memory_bytes_per_second", &ParallelRates::memory_bytes_per_second)
      .field("link_bytes_per_second", &ParallelRates::link_bytes_per_second)
      .field("collective_seconds", &ParallelRates::collective_seconds)
      .done();
  Report<ParallelCandidate>(m, "ParallelCandidate", "A way of computing a bypass on the ranks that no other dominates.")
      .field("plan", &ParallelCandidate::plan)
      .field("forward_us", &ParallelCandidate::forward_us)
      .field("backward_us", &ParallelCandidate::backward_us)
      .field("step_us", &ParallelCandidate::step_us)
      .field("bytes_per_token", &ParallelCandidate::bytes_per_token)
      .field("memory_bytes", &ParallelCandidate::memory_bytes)
      .done();
  Report<ParallelSite>(m, "ParallelSite", "What was decided for the bypasses at one kind of linear.")
      .field("module", &ParallelSite::module)
      .field("count", &ParallelSite::count)
      .field("weight", &ParallelSite::weight)
      .field("x", &ParallelSite::x)
      .field("y", &ParallelSite::y)
      .field("candidates", &ParallelSite::candidates)
      .field("equal", &ParallelSite::equal)
      .field("plan", &ParallelSite::plan)
      .field("reason", &ParallelSite::reason)
      .field("forward_bytes_per_token", &ParallelSite::forward_bytes_per_token)
      .field("backward_bytes_per_token", &ParallelSite::backward_bytes_per_token)
      .field("step_bytes", &ParallelSite::step_bytes)
      .field("parameter_bytes", &ParallelSite::parameter_bytes)
      .field("kept", &ParallelSite::kept)
      .done();
  Report<ParallelPlan>(m, "ParallelPlan",
                       "A model over several devices: memory of the rank that has the most, and what it sends. A plan, "
                       "checked by simulation; an engine runs on one device.")
      .field("tensor_parallel_size", &ParallelPlan::tensor_parallel_size)
      .field("sequence_parallel", &ParallelPlan::sequence_parallel)
      .field("forward_bytes_per_token", &ParallelPlan::forward_bytes_per_token)
      .field("backward_bytes_per_token", &ParallelPlan::backward_bytes_per_token)
      .field("weights", &ParallelPlan::weights)
      .field("kv_pages", &ParallelPlan::kv_pages)
      .field("saved_activations", &ParallelPlan::saved_activations)
      .field("adapters", &ParallelPlan::adapters)
      .field("gradients", &ParallelPlan::gradients)
      .field("optimizer", &ParallelPlan::optimizer)
      .property("total", [](const ParallelPlan& self) -> py::object { return py::int_(self.total()); })
      .field("sites", &ParallelPlan::sites)
      .done();
}

}  // namespace

void register_plan(py::module_& m) {
  register_parallel(m);
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
      .field("offloaded_activations", &MemoryPlan::offloaded_activations)
      .field("swap_space", &MemoryPlan::swap_space)
      .property("total", [](const MemoryPlan& self) -> py::object { return py::int_(self.total()); })
      .field("num_layers", &MemoryPlan::num_layers)
      .field("sequence_length", &MemoryPlan::sequence_length)
      .field("tokens_in_flight", &MemoryPlan::tokens_in_flight)
      .field("max_sequence_length", &MemoryPlan::max_sequence_length)
      .field("saved_bytes_per_token_per_layer", &MemoryPlan::saved_bytes_per_token_per_layer)
      .field("unpruned_bytes_per_token_per_layer", &MemoryPlan::unpruned_bytes_per_token_per_layer)
      .field("tensors", &MemoryPlan::tensors)
      .field("parallel", &MemoryPlan::parallel)
      .done()
      .def("describe", &MemoryPlan::describe)
      .def("__str__", &MemoryPlan::describe);

  m.def(
      "plan",
      [](const py::object& model, const py::object& config, const py::object& adapter,
         const py::object& sequence_length, const py::object& tensor_parallel_size, const py::object& sequence_parallel,
         const py::object& rates) {
        const std::string path = to_path(model, "plan: model");
        const auto engine = convert<std::optional<EngineConfig>>(config, "plan: config").value_or(EngineConfig{});
        const auto method = convert<std::optional<AdapterConfig>>(adapter, "plan: lora");
        const std::int64_t length = to_int64(sequence_length, "plan: sequence_length");
        const ParallelOptions parallel{
            to_int64(tensor_parallel_size, "plan: tensor_parallel_size"),
            to_bool(sequence_parallel, "plan: sequence_parallel"),
            convert<std::optional<ParallelRates>>(rates, "plan: rates").value_or(ParallelRates{})};
        const Released release;
        return plan(path, engine, method, length, parallel);
      },
      py::arg("model"), py::arg("config") = py::none(), py::arg("lora") = py::none(), py::arg("sequence_length") = 1024,
      py::arg("tensor_parallel_size") = 1, py::arg("sequence_parallel") = false, py::arg("rates") = py::none(),
      "The memory table of an engine on `model`, finetuning with `lora`, the configuration of an adapter of any "
      "method, without loading weights; with a tensor_parallel_size, also what every rank of such a group would have "
      "and send.");
}

}  // namespace flexcore::python
