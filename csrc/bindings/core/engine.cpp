#include "flexcore/engine.h"

#include <pybind11/stl.h>

#include <memory>

#include "../interpreter.h"
#include "convert.h"
#include "flexcore/error.h"
#include "register.h"

namespace flexcore::python {
namespace {

// Calls wait and work without the GIL; the engine itself makes them queue up.
using WithoutGil = py::call_guard<Released>;

template <class F>
auto released(F&& work) {
  const Released release;
  return work();
}

SamplingParams to_sampling(py::handle value, const std::string& where) {
  if (value.is_none()) return {};
  auto params = convert<TextSamplingParams>(value, where);
  if (!params.stop.empty())
    throw InvalidArgument(where +
                          ".stop: got strings, wanted none: an engine sees token ids (stop_token_ids); "
                          "flexcore.LLM applies stop strings");
  return params;
}

// One value for all prompts, or a list with one for each.
template <class T, class F>
std::vector<T> broadcast(const py::object& value, std::size_t count, const std::string& where, F&& item) {
  if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value))
    return std::vector<T>(count, item(value, where));
  auto out = to_vector(value, where, "a list", item);
  if (out.size() != count)
    throw InvalidArgument(where + ": got " + std::to_string(out.size()) + " entries, wanted one for each of " +
                          std::to_string(count) + " prompts");
  return out;
}

RequestId submit(Engine& self, const py::object& prompt, const py::object& sampling, const py::object& adapter,
                 const py::object& slo_class, const py::object& waited_ms) {
  Request request{to_ids(prompt, "submit: prompt_token_ids"), to_sampling(sampling, "submit: sampling"),
                  to_name(adapter, "submit: adapter"), to_name(slo_class, "submit: slo_class")};
  request.waited_ms = to_double(waited_ms, "submit: waited_ms");
  return released([&] { return self.submit(request); });
}

std::vector<RequestId> submit_batch(Engine& self, const py::object& prompts, const py::object& sampling,
                                    const py::object& adapter, const py::object& slo_class) {
  auto ids = to_vector(prompts, "submit_batch: prompts", "a list of token id lists", to_ids);
  auto params = broadcast<SamplingParams>(sampling, ids.size(), "submit_batch: sampling", to_sampling);
  auto names = broadcast<std::string>(adapter, ids.size(), "submit_batch: adapter", to_name);
  auto classes = broadcast<std::string>(slo_class, ids.size(), "submit_batch: slo_class", to_name);
  std::vector<Request> requests;
  requests.reserve(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i)
    requests.push_back({std::move(ids[i]), std::move(params[i]), std::move(names[i]), std::move(classes[i])});
  return released([&] { return self.submit_batch(requests); });
}

py::dict loss_and_gradients(Engine& self, const py::object& adapter, const py::object& examples,
                            const py::object& window, const py::object& backward_window,
                            const py::object& dropout_seed) {
  const std::string name = to_string(adapter, "loss_and_gradients: adapter");
  const auto rows = to_examples(examples, "loss_and_gradients: examples");
  const auto forward = convert<std::optional<std::int64_t>>(window, "loss_and_gradients: window_tokens").value_or(0);
  const auto backward =
      convert<std::optional<std::int64_t>>(backward_window, "loss_and_gradients: backward_window_tokens").value_or(0);
  const auto seed = convert<std::optional<std::uint64_t>>(dropout_seed, "loss_and_gradients: dropout_seed");
  auto result = released([&] { return self.loss_and_gradients(name, rows, forward, backward, seed); });
  py::dict out;
  out["loss"] = result.loss;
  for (auto& array : result.gradients) out[py::str(array.name)] = to_array(std::move(array.data), array.shape);
  return out;
}

using Bound = py::class_<Engine>;

void register_serving(Bound& cls) {
  cls.def(py::init([](const py::object& model, const py::object& config) {
            const std::string path = to_path(model, "Engine: model");
            const auto chosen = convert<std::optional<EngineConfig>>(config, "Engine: config").value_or(EngineConfig{});
            const Released release;
            return std::make_unique<Engine>(Engine::load(path, chosen));
          }),
          py::arg("model"), py::arg("config") = py::none());
  cls.def(
      "submit", submit, py::arg("prompt_token_ids"), py::arg("sampling") = py::none(), py::arg("adapter") = py::none(),
      py::arg("slo_class") = py::none(), py::arg("waited_ms") = 0.0,
      "Queues a request; with n > 1 the ids are consecutive from the one returned. waited_ms: since it arrived, which "
      "counts to its first token.");
  cls.def("submit_batch", submit_batch, py::arg("prompts"), py::arg("sampling") = py::none(),
          py::arg("adapter") = py::none(), py::arg("slo_class") = py::none(),
          "Queues all or none; sampling, adapter and slo_class are for all, or one for each.");
  cls.def("step", &Engine::step, WithoutGil(),
          "One iteration: inference first, then as much finetuning as the objective leaves room for.");
  cls.def(
      "cancel",
      [](Engine& self, const py::object& request) {
        const RequestId id = to_int64(request, "cancel: request_id");
        return released([&] { return self.cancel(id); });
      },
      py::arg("request_id"), "False: no such running request. May be called while another thread steps.");
  cls.def("has_work", &Engine::has_work, WithoutGil(), "Anything to serve, or a job that runs.");
  cls.def(
      "score",
      [](Engine& self, const py::object& tokens, const py::object& adapter) {
        const auto ids = to_ids(tokens, "score: token_ids");
        const std::string name = to_name(adapter, "score: adapter");
        auto out = released([&] { return self.score(ids, name); });
        const auto size = static_cast<std::int64_t>(out.size());
        return to_array(std::move(out), {size});
      },
      py::arg("token_ids"), py::arg("adapter") = py::none(),
      "float32 [len - 1]: log p(token i+1 | tokens <= i), by the serving path.");
  cls.def(
      "logits",
      [](Engine& self, const py::object& tokens, const py::object& adapter) {
        const auto ids = to_ids(tokens, "logits: token_ids");
        const std::string name = to_name(adapter, "logits: adapter");
        auto out = released([&] { return self.logits(ids, name); });
        const auto rows = static_cast<std::int64_t>(ids.size());
        const auto size = static_cast<std::int64_t>(out.size());
        return to_array(std::move(out), {rows, rows == 0 ? 0 : size / rows});
      },
      py::arg("token_ids"), py::arg("adapter") = py::none(), "float32 [len, vocab_size], by the serving path.");
}

void register_adapters(Bound& cls) {
  cls.def(
      "create_adapter",
      [](Engine& self, const py::object& name, const py::object& config, const py::object& seed) {
        const std::string adapter = to_string(name, "create_adapter: name");
        const auto method =
            convert<std::optional<AdapterConfig>>(config, "create_adapter: config").value_or(LoraConfig{});
        const std::uint64_t from = to_uint64(seed, "create_adapter: seed");
        released([&] { self.create_adapter(adapter, method, from); });
      },
      py::arg("name"), py::arg("config") = py::none(), py::arg("seed") = 0,
      "A new adapter, a flexcore.LoraConfig by default. It changes nothing yet.");
  const auto with_directory = [&cls](const char* name, auto method, const char* doc) {
    cls.def(
        name,
        [name, method](Engine& self, const py::object& adapter, const py::object& directory) {
          const std::string which = to_string(adapter, std::string(name) + ": name");
          const std::string where = to_path(directory, std::string(name) + ": directory");
          released([&] { (self.*method)(which, where); });
        },
        py::arg("name"), py::arg("directory"), doc);
  };
  with_directory("load_adapter", &Engine::load_adapter, "Reads a PEFT directory.");
  with_directory("save_adapter", &Engine::save_adapter,
                 "Writes a PEFT directory: adapter_config.json and adapter_model.safetensors.");
  cls.def("adapters", &Engine::adapters, WithoutGil());
  cls.def(
      "unload_adapter",
      [](Engine& self, const py::object& name) {
        const std::string which = to_string(name, "unload_adapter: name");
        released([&] { self.unload_adapter(which); });
      },
      py::arg("name"), "Refused while the adapter trains. Its memory is freed when the last request on it ends.");
}

void register_jobs(Bound& cls) {
  cls.def(
      "finetune",
      [](Engine& self, const py::object& adapter, const py::object& examples, const py::object& config) {
        const std::string name = to_string(adapter, "finetune: adapter");
        auto rows = to_examples(examples, "finetune: examples");
        const auto chosen =
            convert<std::optional<FinetuneConfig>>(config, "finetune: config").value_or(FinetuneConfig{});
        return released([&] { return self.finetune(name, std::move(rows), chosen); });
      },
      py::arg("adapter"), py::arg("examples"), py::arg("config") = py::none(), "Starts a job; the steps do its work.");
  cls.def(
      "resume_finetune",
      [](Engine& self, const py::object& directory, const py::object& examples) {
        const std::string where = to_path(directory, "resume_finetune: directory");
        auto rows = to_examples(examples, "resume_finetune: examples");
        return released([&] { return self.resume_finetune(where, std::move(rows)); });
      },
      py::arg("directory"), py::arg("examples"),
      "Goes on from a checkpoint; `examples` must be those of the first call.");
  cls.def(
      "save_checkpoint",
      [](Engine& self, const py::object& job, const py::object& directory) {
        const JobId id = to_int64(job, "save_checkpoint: job_id");
        const std::string where = to_path(directory, "save_checkpoint: directory");
        released([&] { self.save_checkpoint(id, where); });
      },
      py::arg("job_id"), py::arg("directory"), "Adapter, optimizer state and position, as of the last optimizer step.");
  cls.def(
      "snapshot_job",
      [](Engine& self, const py::object& job, bool optimizer) {
        const JobId id = to_int64(job, "snapshot_job: job_id");
        return released([&] { return self.snapshot_job(id, optimizer); });
      },
      py::arg("job_id"), py::arg("optimizer") = true,
      "A copy of the job after its last optimizer step, to be written on any thread while the engine goes on.");
  cls.def(
      "job",
      [](Engine& self, const py::object& job) {
        const JobId id = to_int64(job, "job: job_id");
        return released([&] { return self.job(id); });
      },
      py::arg("job_id"));
  cls.def("jobs", &Engine::jobs, WithoutGil());
  const auto on_job = [&cls](const char* name, void (Engine::*method)(JobId)) {
    cls.def(
        name,
        [name, method](Engine& self, const py::object& job) {
          const JobId id = to_int64(job, std::string(name) + ": job_id");
          released([&] { (self.*method)(id); });
        },
        py::arg("job_id"));
  };
  on_job("pause_job", &Engine::pause_job);
  on_job("resume_job", &Engine::resume_job);
  on_job("cancel_job", &Engine::cancel_job);
  cls.def("loss_and_gradients", loss_and_gradients, py::arg("adapter"), py::arg("examples"),
          py::arg("window_tokens") = py::none(), py::arg("backward_window_tokens") = py::none(),
          py::arg("dropout_seed") = py::none(),
          "Loss and, under PEFT's names, float32 gradients, without an optimizer step.");
}

void register_state(Bound& cls) {
  cls.def(
      "memory", [](const Engine& self) { return to_dict(released([&] { return self.memory(); })); }, "Bytes by tag.");
  cls.def(
      "memory_peak", [](const Engine& self) { return to_dict(released([&] { return self.memory_peak(); })); },
      "Largest bytes by tag since load.");
  cls.def(
      "stats", [](const Engine& self) { return to_dict(released([&] { return self.stats(); })); },
      "Counters and the step-time model's state.");
  cls.def("model", &Engine::model, WithoutGil());
  cls.def(
      "set_slo",
      [](Engine& self, const py::object& slo, const py::object& slo_class) {
        const auto objective = convert<SLO>(slo, "set_slo: slo");
        const std::string name = to_name(slo_class, "set_slo: slo_class");
        released([&] { self.set_slo(objective, name); });
      },
      py::arg("slo"), py::arg("slo_class") = py::none(),
      "Changes an objective, of running requests too; a name that is new becomes a class.");
  cls.def(
      "set_finetune_memory",
      [](Engine& self, const py::object& bytes) {
        const auto most = convert<std::optional<std::int64_t>>(bytes, "set_finetune_memory: bytes");
        released([&] { self.set_finetune_memory(most); });
      },
      py::arg("bytes"), "EngineConfig.finetune_memory_bytes, for the sequences that begin from now on.");
  cls.def(
      "set_policy",
      [](Engine& self, const py::object& policy) {
        const std::string name = to_string(policy, "set_policy: policy");
        released([&] { self.set_policy(name); });
      },
      py::arg("policy"), "EngineConfig.policy, from the next step on.");
}

}  // namespace

void register_snapshot(py::module_& m) {
  py::class_<JobSnapshot>(m, "JobSnapshot")
      .def_property_readonly("step", &JobSnapshot::step)
      .def(
          "save_checkpoint",
          [](const JobSnapshot& self, const py::object& directory) {
            const std::string where = to_path(directory, "save_checkpoint: directory");
            released([&] { self.save_checkpoint(where); });
          },
          py::arg("directory"), "As Engine.save_checkpoint; refused where the optimizer state was left out.")
      .def(
          "save_adapter",
          [](const JobSnapshot& self, const py::object& directory) {
            const std::string where = to_path(directory, "save_adapter: directory");
            released([&] { self.save_adapter(where); });
          },
          py::arg("directory"), "PEFT's files.");
}

void register_engine(py::module_& m) {
  register_snapshot(m);
  Bound cls(m, "Engine", py::release_gil_before_calling_cpp_dtor(),
            "Serves and finetunes one model. Calls from several threads queue up.");
  register_serving(cls);
  register_adapters(cls);
  register_jobs(cls);
  register_state(cls);
}

}  // namespace flexcore::python
