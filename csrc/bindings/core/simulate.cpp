#include "flexcore/simulate.h"

#include <pybind11/stl.h>

#include "../interpreter.h"
#include "record.h"
#include "register.h"

namespace flexcore::python {
namespace {

template <class T, class M>
py::array_t<M> column(const std::vector<T>& rows, M T::* member) {
  py::array_t<M> out(static_cast<py::ssize_t>(rows.size()));
  M* data = out.mutable_data();
  for (std::size_t i = 0; i < rows.size(); ++i) data[i] = rows[i].*member;
  return out;
}

py::object answers(const Simulation& simulation) {
  const auto& rows = simulation.answers;
  py::list tokens;
  for (const SimulatedAnswer& answer : rows)
    tokens.append(py::array_t<double>(static_cast<py::ssize_t>(answer.token_ms.size()), answer.token_ms.data()));
  py::dict out;
  out["token_ms"] = tokens;
  out["kept"] = column(rows, &SimulatedAnswer::kept);
  return out;
}

py::object steps(const Simulation& simulation) {
  const auto& rows = simulation.steps;
  py::dict out;
  out["begin_ms"] = column(rows, &SimulatedStep::begin_ms);
  out["elapsed_ms"] = column(rows, &SimulatedStep::elapsed_ms);
  out["predicted_ms"] = column(rows, &SimulatedStep::predicted_ms);
  out["predicted_upper_ms"] = column(rows, &SimulatedStep::predicted_upper_ms);
  out["budget_ms"] = column(rows, &SimulatedStep::budget_ms);
  out["decode_rows"] = column(rows, &SimulatedStep::decode_rows);
  out["prefill_tokens"] = column(rows, &SimulatedStep::prefill_tokens);
  out["finetune_tokens"] = column(rows, &SimulatedStep::finetune_tokens);
  out["backward_layer_tokens"] = column(rows, &SimulatedStep::backward_layer_tokens);
  out["running"] = column(rows, &SimulatedStep::running);
  out["waiting"] = column(rows, &SimulatedStep::waiting);
  out["floor"] = column(rows, &SimulatedStep::floor);
  return out;
}

Simulation run(const py::object& requests, const py::object& jobs, const py::object& config) {
  const auto trace =
      to_vector(requests, "simulate: requests", "a list of flexcore.SimulatedRequest", convert<SimulatedRequest>);
  const auto work = to_vector(jobs, "simulate: jobs", "a list of flexcore.SimulatedJob", convert<SimulatedJob>);
  const auto chosen = convert<std::optional<SimulationConfig>>(config, "simulate: config").value_or(SimulationConfig{});
  const Released release;
  return simulate(trace, work, chosen);
}

}  // namespace

void register_simulate(py::module_& m) {
  Record<SimulatedRequest>(m, "SimulatedRequest", "One request of a trace.")
      .field("arrival_ms", &SimulatedRequest::arrival_ms)
      .field("prompt_tokens", &SimulatedRequest::prompt_tokens)
      .field("output_tokens", &SimulatedRequest::output_tokens)
      .field("slo_class", &SimulatedRequest::slo_class)
      .done();
  Record<SimulatedJob>(m, "SimulatedJob", "A finetuning job over examples of these lengths, again and again.")
      .field("lengths", &SimulatedJob::lengths)
      .field("batch_size", &SimulatedJob::batch_size)
      .field("weight", &SimulatedJob::weight)
      .done();
  Record<SimulationConfig>(m, "SimulationConfig",
                           "step_time_ms: how long a step takes, by the names in Engine.stats() after "
                           "\"step_time_ms.\"; of `engine`, what the scheduler looks at.")
      .nested("engine", &SimulationConfig::engine)
      .field("num_layers", &SimulationConfig::num_layers)
      .field("num_blocks", &SimulationConfig::num_blocks)
      .field("max_finetune_tokens_in_flight", &SimulationConfig::max_finetune_tokens_in_flight)
      .field("step_time_ms", &SimulationConfig::step_time_ms)
      .field("noise", &SimulationConfig::noise)
      .field("stall_share", &SimulationConfig::stall_share)
      .field("stall_ms", &SimulationConfig::stall_ms)
      .field("between_steps_ms", &SimulationConfig::between_steps_ms)
      .field("optimizer_ms", &SimulationConfig::optimizer_ms)
      .field("duration_ms", &SimulationConfig::duration_ms)
      .done();
  Report<Simulation>(m, "Simulation",
                     "What simulate returns. answers and steps are dicts of columns, one value a request or step.")
      .property("answers", answers)
      .property("steps", steps)
      .field("end_ms", &Simulation::end_ms)
      .field("finetune_tokens", &Simulation::finetune_tokens)
      .field("backward_layer_tokens", &Simulation::backward_layer_tokens)
      .field("trained_tokens", &Simulation::trained_tokens)
      .field("optimizer_steps", &Simulation::optimizer_steps)
      .field("blocks_free", &Simulation::blocks_free)
      .done();
  m.def(
      "simulate", run, py::arg("requests"), py::arg("jobs") = py::tuple(), py::arg("config") = py::none(),
      "Runs the engine's scheduler with a virtual clock: what a machine would do with this traffic. Requests in order "
      "of arrival. Same arguments, same result.");
}

}  // namespace flexcore::python
