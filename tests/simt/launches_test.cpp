#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "core/json.h"
#include "flexcore/engine.h"
#include "model/safetensors.h"
#include "temp_dir.h"

// What launches.json says of each step is what an engine launches for it.
namespace flexcore {
namespace {

std::int64_t number(const Json& object, const char* key) { return object.find(key)->as_int(); }

const Json& expectations() {
  static const Json all = load_json((std::filesystem::path(__FILE__).parent_path() / "launches.json").string());
  return all;
}

/// A model directory of the configuration, with small weights that are no model's.
class TinyModel {
 public:
  explicit TinyModel(const Json& config) {
    dir_.write("config.json", config.dump());
    const std::int64_t hidden = number(config, "hidden_size"), wide = number(config, "intermediate_size"),
                       dim = number(config, "head_dim"), q = dim * number(config, "num_attention_heads"),
                       kv = dim * number(config, "num_key_value_heads");
    const std::string& kind = config.find("model_type")->as_string();
    add("model.embed_tokens.weight", number(config, "vocab_size"), hidden);
    for (std::int64_t layer = 0; layer < number(config, "num_hidden_layers"); ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".", attention = prefix + "self_attn.";
      add(attention + "q_proj.weight", q, hidden);
      add(attention + "k_proj.weight", kv, hidden);
      add(attention + "v_proj.weight", kv, hidden);
      add(attention + "o_proj.weight", hidden, q);
      if (kind == "qwen2")
        for (const auto& [name, size] : {std::pair{"q", q}, std::pair{"k", kv}, std::pair{"v", kv}})
          add(attention + name + "_proj.bias", size, 0);
      if (kind == "qwen3")
        for (const char* name : {"q_norm.weight", "k_norm.weight"}) add(attention + name, dim, 0);
      add(prefix + "mlp.gate_proj.weight", wide, hidden);
      add(prefix + "mlp.up_proj.weight", wide, hidden);
      add(prefix + "mlp.down_proj.weight", hidden, wide);
      add(prefix + "input_layernorm.weight", hidden, 0);
      add(prefix + "post_attention_layernorm.weight", hidden, 0);
    }
    add("model.norm.weight", hidden, 0);
    std::vector<std::pair<std::string, TensorView>> views;
    for (auto& [name, rows, columns, data] : tensors_)
      views.emplace_back(name, columns > 0 ? TensorView(data.data(), DType::kFloat32, {rows, columns})
                                           : TensorView(data.data(), DType::kFloat32, {rows}));
    write_safetensors(dir_.path("model.safetensors"), views);
  }
  std::string path() const { return dir_.path(); }

 private:
  struct Tensor {
    std::string name;
    std::int64_t rows, columns;
    std::vector<float> data;
  };
  void add(const std::string& name, std::int64_t rows, std::int64_t columns) {
    std::vector<float> data(static_cast<std::size_t>(rows * std::max<std::int64_t>(columns, 1)));
    for (std::size_t i = 0; i < data.size(); ++i)
      data[i] = 0.05f * static_cast<float>((i * 7 + name.size()) % 11) - 0.2f;
    tensors_.push_back({name, rows, columns, std::move(data)});
  }
  TempDir dir_;
  std::vector<Tensor> tensors_;
};

std::vector<std::int32_t> tokens(std::int64_t count, std::int64_t first) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>((first + 3 * i) % 50));
  return ids;
}

/// Of engine steps in which every request's prompt is read, or every request gets its next token: launched one by one
/// at first, then replayed as a graph.
std::vector<std::int64_t> serving_launches(Engine& engine, const Json& step) {
  const bool decode = step.find("step")->as_string() == "decode";
  const auto& prompts = step.find("prompts")->as_array();
  const auto count = static_cast<std::int64_t>(prompts.size()), adapters = number(step, "adapters");
  std::int64_t rows = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t length = prompts[static_cast<std::size_t>(i)].as_int();
    rows += length;
    Request request{.prompt_token_ids = tokens(length, i)};
    request.sampling.max_tokens = 6;
    request.sampling.temperature = 0;
    request.sampling.ignore_eos = true;
    if (adapters > 0) request.adapter = "adapter" + std::to_string(i * adapters / count);
    engine.submit(request);
  }
  std::vector<std::int64_t> found;
  while (engine.has_work()) {
    const std::int64_t before = simt::num_launches();
    const StepReport report = engine.step();
    const bool is_step = decode ? report.num_decode_tokens == count : report.num_prefill_tokens == rows;
    if (is_step) found.push_back(simt::num_launches() - before);
  }
  return found;
}

/// Of a sequence's way forth and back.
std::int64_t finetune_launches(Engine& engine, const Json& step) {
  const auto ids = tokens(number(step, "tokens"), 1);
  const std::int64_t before = simt::num_launches();
  engine.loss_and_gradients("adapter0", {{ids, ids}}, number(step, "window"), number(step, "backward_window"));
  return simt::num_launches() - before;
}

class Launches : public testing::TestWithParam<std::size_t> {};

TEST_P(Launches, OfEveryStepAreKnown) {
  const Json& model = expectations().find("models")->as_array()[GetParam()];
  const TinyModel directory(*model.find("config"));
  EngineConfig config;
  config.device = "cuda";
  config.max_model_len = 320;
  config.max_num_seqs = 8;
  config.num_threads = 1;
  config.enable_prefix_caching = false;
  Engine engine = Engine::load(directory.path(), config);
  LoraConfig lora;
  lora.r = number(expectations(), "rank");
  lora.target_modules = {"all-linear"};
  for (int i = 0; i < 6; ++i) engine.create_adapter("adapter" + std::to_string(i), lora);
  for (const auto& step : model.find("steps")->as_array()) {
    std::vector<std::int64_t> found;
    if (step.find("step")->as_string() == "finetune")
      found = {finetune_launches(engine, step)};
    else
      found = serving_launches(engine, step);
    EXPECT_FALSE(found.empty());
    for (const auto launches : found) EXPECT_EQ(launches, number(step, "launches")) << step.dump();
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Launches, testing::Range<std::size_t>(0, 3), [](const auto& info) {
  return expectations().find("models")->as_array()[info.param].find("config")->find("model_type")->as_string();
});

}  // namespace
}  // namespace flexcore
