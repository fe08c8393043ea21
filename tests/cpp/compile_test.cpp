#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "compile/compiled_model.h"
#include "model/archs/archs.h"
#include "peft/attach.h"

namespace flexcore {
namespace {

ModelConfig small_config(Architecture architecture = Architecture::kLlama) {
  ModelConfig config;
  config.architecture = architecture;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.vocab_size = 64;
  config.max_position_embeddings = 128;
  config.tie_word_embeddings = true;
  config.sliding_window.assign(3, 0);
  return config;
}

BypassSet at_sites(const Graph& graph, const std::vector<std::string>& ends, int layer = kNoLayer,
                   BypassKind kind = BypassKind::kLora) {
  BypassSet bypasses;
  for (std::size_t i = 0; i < graph.sites.size(); ++i)
    for (const auto& end : ends)
      if (graph.sites[i].path.ends_with(end) && (layer == kNoLayer || graph.sites[i].layer == layer))
        bypasses.insert({static_cast<SiteId>(i), kind});
  return bypasses;
}

class CompileTest : public ::testing::Test {
 protected:
  explicit CompileTest(Architecture architecture = Architecture::kLlama)
      : model(build_model(small_config(architecture), DType::kBFloat16), attach_bypasses, {64, 8, 64}) {}

  std::map<std::string, Keep> choices(const TrainingProgram& program, int layer) {
    std::map<std::string, Keep> result;
    for (const auto& choice : program.choices)
      if (choice.layer == layer) result[choice.name] = choice.keep;
    return result;
  }
  /// Of the middle layer, at a second a FLOP; the first keeps everything.
  std::vector<KeepOption> options_of(const BypassSet& bypasses) {
    Graph graph = model.base();
    attach_bypasses(graph, &bypasses);
    fuse_shared_inputs(graph);
    const std::size_t num_forward = graph.nodes.size();
    derive_backward(graph);
    auto options = keep_options(graph, num_forward, 1, {.seconds_per_flop = 1, .seconds_per_byte = 0, .context = 10});
    EXPECT_GE(options.size(), 4u);
    EXPECT_TRUE(options.front().keep.recomputed.empty());
    return options;
  }
  CompiledModel model;
};

TEST_F(CompileTest, LinearsOfOneInputBecomeOneNode) {
  const Graph& graph = model.trunk().graph();
  std::map<std::string_view, int> per_layer;
  for (const auto& node : graph.nodes)
    if (node.layer == 1) ++per_layer[node.op->name()];
  EXPECT_EQ(per_layer["linear"], 6);        // qkv, o, gate+up, down; o and down apart from the residual
  EXPECT_EQ(per_layer["lora"], 4 + 2 + 7);  // of these; of the products of o and down; behind each of the seven
  EXPECT_EQ(per_layer["scale"], 7 + 2);     // what each of the seven makes; what o and down read
  EXPECT_EQ(per_layer["dropped_linear"], 2 * 7);
}

TEST_F(CompileTest, KeepsWhatOnlyGemmsAndAttentionMake) {
  const auto all = model.lora_everywhere();
  const auto& program = model.training(all);
  EXPECT_EQ(program.first_layer, 0);
  const auto middle = choices(program, 1);
  for (const char* name : {"hidden", "q.rotated", "attention", "attention.lse", "attention_residual", "gate", "up"})
    EXPECT_EQ(middle.at(name), Keep::kKept) << name;
  for (const char* name : {"attention_norm", "mlp_norm", "mlp"}) EXPECT_EQ(middle.at(name), Keep::kRebuilt) << name;
  for (const char* name : {"k.rotated", "v"}) EXPECT_EQ(middle.at(name), Keep::kInPages) << name;
  for (const char* name : {"q", "k"}) EXPECT_EQ(middle.at(name), Keep::kDropped) << name;
  // The lowest layer rebuilds its input from the token ids.
  EXPECT_FALSE(choices(program, 0).contains("hidden") && choices(program, 0).at("hidden") == Keep::kKept);

  std::size_t bytes = 0;
  for (const auto& saved : program.saved) {
    EXPECT_EQ(saved.offset, bytes);
    bytes += saved.bytes_per_token();
  }
  EXPECT_EQ(program.saved_bytes_per_token.device, bytes);
  // bf16: x, q, o, x2 of 32, gate and up of 48, float32 lse of 4 heads.
  const std::size_t layer = 2 * (4 * 32 + 2 * 48) + 4 * 4;
  EXPECT_EQ(bytes, 3 * layer - 2 * 32);
}

// Less memory for more time, down to the layer's input alone; what is promised is what a program then keeps.
TEST_F(CompileTest, KeepsLessForMoreTime) {
  const auto all = model.lora_everywhere();
  const auto candidates = model.keep_candidates(all);
  ASSERT_GT(candidates.size(), 8u);
  EXPECT_EQ(candidates.front().choice, KeepChoice{});
  std::size_t least = model.training(all).saved_bytes_per_token.device;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    const auto& candidate = candidates[i];
    EXPECT_GE(candidate.seconds_per_token, candidates[i > 0 ? i - 1 : 0].seconds_per_token);
    const auto& program = model.training(all, candidate.choice);
    EXPECT_EQ(program.saved_bytes_per_token.device, candidate.bytes_per_token.device);
    EXPECT_EQ(program.saved_bytes_per_token.host, 0u);
    EXPECT_EQ(candidate.bytes_per_token.host, 0u);
    EXPECT_EQ(program.backward_cost == 1.0, i == 0);
    least = std::min(least, program.saved_bytes_per_token.device);
  }
  EXPECT_EQ(least, 2u * 2 * 32);  // bf16 inputs of two layers; the lowest's are the tokens
}

TEST_F(CompileTest, OfALayersChoicesNoneIsWorseThanAnother) {
  // By hand: 2^6 subsets of q, attention, lse, residual, gate and up, and the front of them.
  const auto options = options_of(model.lora_everywhere());
  for (std::size_t i = 1; i < options.size(); ++i) {
    EXPECT_GT(options[i].seconds_per_token, options[i - 1].seconds_per_token);
    EXPECT_LT(options[i].bytes_per_token.device, options[i - 1].bytes_per_token.device);
  }
  const std::set<std::string> everything = {"attention", "attention.lse", "attention_residual",
                                            "gate",      "q.rotated",     "up"};
  EXPECT_EQ(options.back().keep.recomputed, everything);
  // q, attention over 10 positions, o, gate and up, and their bypasses of rank 16.
  const auto linear = [](double in, double out) { return 2 * in * out + 2 * 16 * (in + out); };
  EXPECT_DOUBLE_EQ(options.back().seconds_per_token, 2 * linear(32, 32) + 4 * 32 * 10 + 2 * linear(32, 48));
}

// DoRA with dropout has a layer keep more than is tried one by one: the smallest are recomputed together, or not.
TEST_F(CompileTest, ManyTensorsOfALayerAreStillFewChoices) {
  auto all = at_sites(model.base(), {"proj"}, kNoLayer, BypassKind::kDora);
  all.merge(at_sites(model.base(), {"proj"}, kNoLayer, BypassKind::kDropped));
  const auto options = options_of(all);
  EXPECT_GT(options.back().keep.recomputed.size(), 11u);
  EXPECT_EQ(options.back().bytes_per_token.device, 2u * 32);  // its input, in bf16
}

// With host memory, nothing need be kept on the device; a slow way there is for what nothing else spares.
TEST_F(CompileTest, KeepsInHostMemoryWhatCostsLessThere) {
  const auto all = model.lora_everywhere();
  for (const bool fast : {true, false}) {
    CompiledModel with_host(model.base(), attach_bypasses, {64, 8, 64});
    OperatorRates rates{.seconds_per_flop = 1, .seconds_per_byte = 0, .context = 10};
    rates.seconds_per_host_byte = fast ? 1e-3 : 1e6;
    with_host.set_rates(rates);
    std::size_t least = with_host.training(all).saved_bytes_per_token.device;
    bool nothing_recomputed = true;
    for (const auto& candidate : with_host.keep_candidates(all)) {
      const auto& program = with_host.training(all, candidate.choice);
      EXPECT_EQ(program.saved_bytes_per_token.device, candidate.bytes_per_token.device);
      EXPECT_EQ(program.saved_bytes_per_token.host, candidate.bytes_per_token.host);
      std::size_t device = 0, host = 0;
      for (const bool whole : {true, false})
        for (const auto& saved : program.saved) {
          if ((saved.bytes_per_token() % 16 == 0) != whole) continue;
          std::size_t& before = saved.in_host ? host : device;
          EXPECT_EQ(saved.offset, before);
          before += saved.bytes_per_token();
        }
      EXPECT_EQ(host, program.saved_bytes_per_token.host);
      if (program.saved_bytes_per_token.device >= least) continue;
      least = program.saved_bytes_per_token.device;
      for (const auto& [name, keep] : choices(program, 1)) {
        nothing_recomputed = nothing_recomputed && keep != Keep::kRecomputed;
        EXPECT_TRUE(fast || keep != Keep::kOffloaded || name == "hidden") << name;
      }
      if (least == 0) break;  // the fastest of these
    }
    EXPECT_EQ(least, 0u);
    EXPECT_EQ(nothing_recomputed, fast);
  }
}

TEST_F(CompileTest, NothingBelowTheLowestBypass) {
  const auto& program = model.training(at_sites(model.base(), {"q_proj", "v_proj"}, 1));
  EXPECT_EQ(program.first_layer, 1);
  EXPECT_TRUE(program.layers[0].program.empty());
  EXPECT_EQ(program.layers[1].grad_out, kNoTensor);
  EXPECT_NE(program.layers[2].grad_out, kNoTensor);
  for (const auto& saved : program.saved) EXPECT_GE(saved.layer, 1);
  // In layer 1 the chain ends at q and v: the attention norm's input has no gradient and is not kept for one.
  const auto lowest = choices(program, 1);
  EXPECT_EQ(lowest.at("attention_norm"), Keep::kKept);
  EXPECT_FALSE(lowest.contains("hidden") && lowest.at("hidden") == Keep::kKept);
}

TEST_F(CompileTest, FewerTargetsKeepLess) {
  const auto all = model.lora_everywhere();
  const auto full = model.training(all).saved_bytes_per_token.device;
  const auto down = model.training(at_sites(model.base(), {"down_proj"})).saved_bytes_per_token.device;
  EXPECT_LT(down, full);
  EXPECT_EQ(&model.training(all), &model.training(all));
}

TEST_F(CompileTest, DownOnlyInTheTopLayerKeepsOnlyTheMlp) {
  const auto& program = model.training(at_sites(model.base(), {"down_proj"}, 2));
  EXPECT_EQ(program.first_layer, 2);
  ASSERT_EQ(program.saved.size(), 1u);  // the bypass's own input, nothing else has a gradient
  EXPECT_EQ(program.saved[0].width, 48);
}

TEST_F(CompileTest, NoTrainableSiteIsRefused) { EXPECT_THROW(model.training({}), InvalidArgument); }

class Qwen3CompileTest : public CompileTest {
 protected:
  Qwen3CompileTest() : CompileTest(Architecture::kQwen3) {}
};

TEST_F(Qwen3CompileTest, RotatedQueriesAreRebuiltThroughTheHeadNorm) {
  const auto all = model.lora_everywhere();
  const auto top = choices(model.training(all), 2);
  EXPECT_EQ(top.at("q"), Keep::kKept);
  EXPECT_EQ(top.at("k"), Keep::kKept);
  EXPECT_EQ(top.at("q.norm.rotated"), Keep::kRebuilt);
}

}  // namespace
}  // namespace flexcore
