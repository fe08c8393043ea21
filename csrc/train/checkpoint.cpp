#include "train/checkpoint.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/json.h"
#include "model/safetensors.h"
#include "peft/peft_files.h"

namespace flexcore {

namespace {

constexpr const char* kStateFile = "trainer_state.json";
constexpr const char* kOptimizerFile = "optimizer.safetensors";
constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max();

Json optional_int(const std::optional<std::int64_t>& value) { return value ? Json(*value) : Json(); }

Json config_json(const FinetuneConfig& c) {
  return Json::Object{{"num_epochs", c.num_epochs},
                      {"batch_size", c.batch_size},
                      {"learning_rate", c.learning_rate},
                      {"optimizer", c.optimizer},
                      {"weight_decay", c.weight_decay},
                      {"betas", Json::Array{c.betas[0], c.betas[1]}},
                      {"eps", c.eps},
                      {"max_grad_norm", c.max_grad_norm},
                      {"lr_scheduler", c.lr_scheduler},
                      {"warmup_ratio", c.warmup_ratio},
                      {"shuffle", c.shuffle},
                      {"seed", static_cast<std::int64_t>(c.seed)},
                      {"window_tokens", optional_int(c.window_tokens)},
                      {"backward_window_tokens", optional_int(c.backward_window_tokens)},
                      {"weight", c.weight}};
}

class Fields {
 public:
  Fields(const Json& object, std::string path) : object_(object), path_(std::move(path)) {}
  const Json& at(std::string_view key) const {
    const Json* value = object_.find(key);
    require<ModelLoadError>(value != nullptr, path_, ": no field \"", key, "\"");
    return *value;
  }
  std::int64_t integer(std::string_view key, std::int64_t low, std::int64_t high) const {
    const std::int64_t value = at(key).as_int();
    require<ModelLoadError>(low <= value && value <= high, path_, ": ", key, ": ", value, ", wanted ", low, " to ",
                            high);
    return value;
  }
  std::optional<std::int64_t> optional(std::string_view key) const {
    const Json& value = at(key);
    return value.is_null() ? std::nullopt : std::optional(value.as_int());
  }

 private:
  const Json& object_;
  std::string path_;
};

FinetuneConfig parse_config(const Fields& f) {
  const auto betas = f.at("betas").as_array();
  require<ModelLoadError>(betas.size() == 2, kStateFile, ": betas has ", betas.size(), " entries, wanted 2");
  return {.num_epochs = f.at("num_epochs").as_int(),
          .batch_size = f.at("batch_size").as_int(),
          .learning_rate = f.at("learning_rate").as_double(),
          .optimizer = f.at("optimizer").as_string(),
          .weight_decay = f.at("weight_decay").as_double(),
          .betas = {betas[0].as_double(), betas[1].as_double()},
          .eps = f.at("eps").as_double(),
          .max_grad_norm = f.at("max_grad_norm").as_double(),
          .lr_scheduler = f.at("lr_scheduler").as_string(),
          .warmup_ratio = f.at("warmup_ratio").as_double(),
          .shuffle = f.at("shuffle").as_bool(),
          .seed = static_cast<std::uint64_t>(f.at("seed").as_int()),
          .window_tokens = f.optional("window_tokens"),
          .backward_window_tokens = f.optional("backward_window_tokens"),
          .weight = f.at("weight").as_double()};
}

}  // namespace

JobState copy_state(const TrainingJob& job, const Adapter& adapter, bool whole) {
  JobState state{.job = job.id,
                 .step = job.step,
                 .adapter = adapter.config,
                 .tensors = adapter_tensors(adapter, adapter.download().data())};
  if (!whole) return state;
  state.moments = job.download_optimizer();
  const Json position = Json::Object{{"format", 1},
                                     {"adapter", job.adapter},
                                     {"step", job.step},
                                     {"total_steps", job.total_steps()},
                                     {"loss", job.loss},
                                     {"trained_tokens", job.trained_tokens},
                                     {"num_examples", job.num_examples},
                                     {"version", adapter.version},
                                     {"config", config_json(job.config)}};
  state.position = position.dump(2) + "\n";
  return state;
}

void write_checkpoint(const std::string& directory, const JobState& state) {
  require(state.position.has_value(), "job ", state.job, ": its optimizer state is gone, as it has ended, or was left ",
          "out; save_adapter still saves the result");
  AtomicDirectory target(directory);
  write_peft(target, state.adapter, state.tensors);
  std::vector<std::pair<std::string, TensorView>> tensors;
  if (!state.moments.empty()) {
    const TensorView moments(const_cast<float*>(state.moments.data()), DType::kFloat32,
                             {2, static_cast<std::int64_t>(state.moments.size() / 2)});
    tensors = {{"exp_avg", moments.rows(0, 1)}, {"exp_avg_sq", moments.rows(1, 2)}};
  }
  write_safetensors(target.file(kOptimizerFile), tensors);
  write_file(target.file(kStateFile), *state.position);
  target.commit();
}

Checkpoint read_checkpoint(const std::string& directory) {
  const std::string path = directory + "/" + kStateFile;
  const Json state = load_json(path);
  try {
    const Fields fields(state, path);
    require<ModelLoadError>(fields.at("format").as_int() == 1, path, ": format ", fields.at("format").describe(),
                            ", wanted 1");
    Checkpoint checkpoint{.adapter = fields.at("adapter").as_string(),
                          .config = parse_config(Fields(fields.at("config"), path)),
                          .loss = fields.at("loss").as_double()};
    check(checkpoint.config);
    checkpoint.num_examples = fields.integer("num_examples", 1, kMaxCount);
    const std::int64_t steps = steps_per_epoch(checkpoint.config, checkpoint.num_examples);
    checkpoint.step = fields.integer("step", 0, steps * checkpoint.config.num_epochs - 1);
    checkpoint.trained_tokens = fields.integer("trained_tokens", 0, std::int64_t{1} << 62);
    checkpoint.version = fields.integer("version", 0, kMaxCount);
    return checkpoint;
  } catch (const InvalidArgument& error) {
    throw ModelLoadError(str(path, ": ", error.what()));
  }
}

void read_optimizer_state(const std::string& directory, TrainingJob& job, const Adapter& adapter) {
  const TensorView moments = job.optimizer_view();
  if (!moments) return;
  const SafetensorsModel file(directory + "/" + kOptimizerFile);
  std::int64_t row = 0;
  for (const char* name : {"exp_avg", "exp_avg_sq"}) {
    const TensorView stored = file.tensor(name);
    require<ModelLoadError>(stored.dtype() == DType::kFloat32 && stored.size() == adapter.layout.num_parameters,
                            directory, "/", kOptimizerFile, ": ", name, " is ", stored.describe(),
                            ", wanted float32 with ", adapter.layout.num_parameters, " elements");
    const auto* bytes = stored.as<std::byte>();
    job.upload_optimizer(row, bytes);
    ++row;
  }
}

}  // namespace flexcore
