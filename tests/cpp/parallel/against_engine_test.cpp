#include <gtest/gtest.h>

#include <cmath>

#include "flexcore/engine.h"
#include "model/archs/archs.h"
#include "model/safetensors.h"
#include "parallel/model_run.h"
#include "peft/layout.h"
#include "peft/peft_files.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

using test::Block;
using test::ModelRun;
using test::Ranks;

constexpr std::int64_t kRank = 5;

// The same model, adapter and tokens through the engine on one device, and through the chosen plans on simulated ranks.
class AgainstTheEngine : public ::testing::TestWithParam<const char*> {
 protected:
  std::string write_model(const Graph& graph, const std::vector<Block>& weights) {
    std::vector<std::pair<std::string, TensorView>> tensors;
    for (std::size_t i = 0; i < graph.params.size(); ++i) {
      const auto& param = graph.params[i];
      auto* data = const_cast<float*>(weights[i].data.data());
      tensors.emplace_back(param.name, param.in_features > 0
                                           ? TensorView(data, DType::kFloat32, {param.out_features, param.in_features})
                                           : TensorView(data, DType::kFloat32, {param.out_features}));
    }
    write_safetensors(dir_.path("model.safetensors"), tensors);
    return dir_.path();
  }
  TempDir dir_;
};

TEST_P(AgainstTheEngine, LossAndGradientsAgree) {
  const std::string name = GetParam();
  setenv("FLEXCORE_CACHE", dir_.path("cache").c_str(), 1);
  dir_.write("config.json", R"({"architectures": [")" + name + R"(ForCausalLM"], "model_type": ")" +
                                (name == "Llama" ? "llama" : "qwen3") + R"(", "hidden_size": 32,
      "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
      "vocab_size": 50, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
      "tie_word_embeddings": true, "hidden_act": "silu"})");
  const ModelConfig config = ModelConfig::load(dir_.path());
  const Graph graph = build_model(config, DType::kFloat32);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < 23; ++i) tokens.push_back((i * i * 7 + 5 * i + 3) % 50);
  const auto targets = static_cast<double>(tokens.size() - 1);

  std::vector<AdapterTensor> adapter;  // A and B of each site
  std::mt19937 rng(3);
  for (const auto& site : graph.layer_sites()) {
    adapter.push_back({{site.path, ".lora_A.weight", {kRank, site.in_features}},
                       Block::random(kRank, site.in_features, rng, 0.2f).data});
    adapter.push_back({{site.path, ".lora_B.weight", {site.out_features, kRank}},
                       Block::random(site.out_features, kRank, rng, 0.2f).data});
  }
  const LoraConfig lora{.r = kRank, .lora_alpha = kRank};  // scaling 1
  write_peft(dir_.path("adapter"), lora, adapter);

  std::optional<LossAndGradients> want;
  for (const int count : {1, 2, 4, 8}) {
    Ranks ranks(count);
    ModelRun run(graph, config, {count, count == 4}, ranks);
    for (std::size_t i = 0; i < graph.layer_sites().size(); ++i) {
      const auto& site = graph.sites[i];
      const BypassForm form = lora_form(site.in_features, site.out_features, kRank);
      const auto id = static_cast<SiteId>(i);
      const auto choice = choose_plan(form, site_states(graph, run.backbone(), id), {}, count, {});
      Block a(kRank, site.in_features), b(site.out_features, kRank);
      a.data = adapter[2 * i].values;
      b.data = adapter[2 * i + 1].values;
      run.attach(id, form, choice.best().plan, {a, b});
    }
    const auto got = run.run(tokens);
    if (!want) {
      Engine engine = Engine::load(write_model(graph, run.weights()),
                                   {.device = "cpu", .dtype = "float32", .max_model_len = 64, .num_threads = 1});
      engine.load_adapter("a", dir_.path("adapter"));
      want = engine.loss_and_gradients("a", {{tokens, tokens}});
    }
    double loss = 0;
    for (const float value : got.losses.data) loss += value / targets;
    EXPECT_NEAR(loss, want->loss, 1e-5 * want->loss);
    std::size_t compared = 0;
    for (std::size_t i = 0; i < graph.layer_sites().size(); ++i)
      for (const std::size_t factor : {0, 1}) {
        Block mine = got.weight_gradients.at(static_cast<SiteId>(i))[factor];
        for (auto& value : mine.data) value = static_cast<float>(value / targets);
        for (const auto& array : want->gradients) {
          if (array.name != peft_key(adapter[2 * i + factor].array)) continue;
          Block theirs(mine.rows, mine.features);
          theirs.data = array.data;
          EXPECT_LT(test::relative_error(mine, theirs), 2e-5) << array.name << " on " << count;
          ++compared;
        }
      }
    EXPECT_EQ(compared, want->gradients.size());
    EXPECT_EQ(compared, 2 * graph.layer_sites().size());
  }
}

INSTANTIATE_TEST_SUITE_P(Parallel, AgainstTheEngine, ::testing::Values("Llama", "Qwen3"));

}  // namespace
}  // namespace flexcore
