#include <cmath>

#include "core/check.h"
#include "core/json.h"
#include "flexcore/error.h"
#include "model/config.h"
#include "model/rotary.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

/// A small, valid config.json; the members of `changes` replace or extend it, and null removes.
Json config_json(const std::string& architecture, const std::string& changes = "{}") {
  Json::Object members = Json::parse(R"({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"})")
                             .as_object();
  members.emplace_back("architectures", Json::Array{architecture});
  for (const auto& [key, value] : Json::parse(changes).as_object()) {
    std::erase_if(members, [&](const auto& member) { return member.first == key; });
    members.emplace_back(key, value);
  }
  return members;
}

ModelConfig parse(const std::string& architecture, const std::string& changes = "{}") {
  return ModelConfig::parse(config_json(architecture, changes), nullptr, "config.json");
}

template <class E = ModelLoadError>
std::string refusal(const std::string& architecture, const std::string& changes) {
  return message_of<E>([&] { parse(architecture, changes); });
}

TEST(ModelConfig, ReadsLlama) {
  const auto config = parse("LlamaForCausalLM", R"({"tie_word_embeddings": true, "eos_token_id": 2})");
  EXPECT_EQ(config.architecture, Architecture::kLlama);
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.intermediate_size, 96);
  EXPECT_EQ(config.num_layers, 4);
  EXPECT_EQ(config.num_heads, 8);
  EXPECT_EQ(config.num_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.vocab_size, 100);
  EXPECT_EQ(config.max_position_embeddings, 512);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_FALSE(config.attention_bias || config.attention_output_bias || config.mlp_bias || config.qk_norm);
  EXPECT_EQ(config.sliding_window, std::vector<std::int64_t>(4, 0));
  EXPECT_EQ(config.eos_token_ids, std::vector<std::int32_t>{2});
}

TEST(ModelConfig, FillsInDefaults) {
  const auto config =
      parse("LlamaForCausalLM", R"({"num_key_value_heads": null, "rms_norm_eps": null, "rope_theta": null})");
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_TRUE(config.eos_token_ids.empty());
  EXPECT_EQ(parse("LlamaForCausalLM", R"({"head_dim": 24})").head_dim, 24);
  EXPECT_EQ(parse("Qwen3ForCausalLM").head_dim, 128);
}

TEST(ModelConfig, KnowsWhichLinearsHaveABias) {
  const auto llama = parse("LlamaForCausalLM", R"({"attention_bias": true, "mlp_bias": true})");
  EXPECT_TRUE(llama.attention_bias && llama.attention_output_bias && llama.mlp_bias);
  const auto qwen2 = parse("Qwen2ForCausalLM");
  EXPECT_TRUE(qwen2.attention_bias);
  EXPECT_FALSE(qwen2.attention_output_bias);
  const auto qwen3 = parse("Qwen3ForCausalLM");
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_FALSE(qwen3.attention_bias);
  EXPECT_FALSE(parse("MistralForCausalLM", R"({"attention_bias": true})").attention_bias);
}

TEST(ModelConfig, SlidesTheRightLayers) {
  using Windows = std::vector<std::int64_t>;
  EXPECT_EQ(parse("MistralForCausalLM", R"({"sliding_window": 32})").sliding_window, Windows(4, 32));
  EXPECT_EQ(parse("MistralForCausalLM", R"({"sliding_window": null})").sliding_window, Windows(4, 0));
  EXPECT_EQ(parse("MistralForCausalLM").sliding_window, Windows(4, 4096));
  EXPECT_EQ(parse("LlamaForCausalLM", R"({"sliding_window": 32})").sliding_window, Windows(4, 0));
  const char* qwen = "Qwen2ForCausalLM";
  EXPECT_EQ(parse(qwen, R"({"sliding_window": 32, "max_window_layers": 0})").sliding_window, Windows(4, 0));
  EXPECT_EQ(
      parse(qwen, R"({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0})").sliding_window,
      Windows(4, 0));
  EXPECT_EQ(parse(qwen, R"({"use_sliding_window": true, "sliding_window": 32, "max_window_layers": 3})").sliding_window,
            (Windows{0, 0, 0, 32}));
  EXPECT_EQ(parse(qwen, R"({"use_sliding_window": true, "sliding_window": 32, "layer_types":
                            ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]})")
                .sliding_window,
            (Windows{32, 0, 32, 0}));
  EXPECT_HAS(refusal(qwen, R"({"layer_types": ["full_attention"]})"), "layer_types");
  EXPECT_HAS(refusal<Unsupported>(qwen, R"({"layer_types": ["a", "a", "a", "a"]})"), "\"a\"");
}

TEST(ModelConfig, ReadsOldAndNewRope) {
  const char* llama3 = R"("rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                          "original_max_position_embeddings": 128)";
  const auto old = parse("LlamaForCausalLM", str(R"({"rope_theta": 500000, "rope_scaling": {)", llama3, "}}")).rope;
  const auto fresh = parse("LlamaForCausalLM",
                           str(R"({"rope_theta": null, "rope_parameters": {"rope_theta": 500000.0, )", llama3, "}}"))
                         .rope;
  for (const auto& rope : {old, fresh}) {
    EXPECT_EQ(rope.type, RopeConfig::Type::kLlama3);
    EXPECT_EQ(rope.theta, 500000.0);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.original_max_position_embeddings, 128);
  }
  const auto linear = parse("LlamaForCausalLM", R"({"rope_scaling": {"type": "linear", "factor": 2.5}})").rope;
  EXPECT_EQ(linear.type, RopeConfig::Type::kLinear);
  const auto yarn = parse("Qwen2ForCausalLM", R"({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})").rope;
  EXPECT_EQ(yarn.original_max_position_embeddings, 512);
  EXPECT_DOUBLE_EQ(yarn.attention_factor, 0.1 * std::log(4.0) + 1.0);
}

TEST(ModelConfig, RefusesRopeItCannotHonour) {
  EXPECT_HAS(refusal<Unsupported>("LlamaForCausalLM", R"({"rope_scaling": {"type": "dynamic", "factor": 2}})"),
             "\"dynamic\"");
  EXPECT_HAS(refusal<Unsupported>("LlamaForCausalLM", R"({"partial_rotary_factor": 0.5})"), "partial_rotary_factor");
  EXPECT_HAS(refusal<Unsupported>("LlamaForCausalLM", R"({"rope_parameters": {"full_attention": {"rope_theta": 1}}})"),
             "full_attention");
  EXPECT_HAS(refusal("LlamaForCausalLM", R"({"rope_scaling": {"type": "linear"}})"), "rope_scaling: factor: missing");
  EXPECT_HAS(refusal("LlamaForCausalLM", R"({"rope_scaling": [1]})"), "wanted an object");
  EXPECT_HAS(refusal("LlamaForCausalLM", R"({"rope_theta": -1})"), "rope_theta");
}

TEST(ModelConfig, RefusesUnknownArchitecturesByName) {
  const auto message = refusal<Unsupported>("GPT2LMHeadModel", "{}");
  EXPECT_HAS(message, "GPT2LMHeadModel");
  EXPECT_HAS(message, "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM");
  EXPECT_HAS(refusal("LlamaForCausalLM", R"({"architectures": null})"), "architectures: missing");
}

TEST(ModelConfig, NamesFieldsThatMakeNoSense) {
  const char* llama = "LlamaForCausalLM";
  for (const char* field : {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                            "vocab_size", "max_position_embeddings"}) {
    EXPECT_HAS(refusal(llama, str("{\"", field, "\": null}")), str(field, ": missing"));
    for (const char* value : {"0", "-1", "\"x\"", "1.5", "[]", "99999999999"})
      EXPECT_HAS(refusal(llama, str("{\"", field, "\": ", value, "}")), str("config.json: ", field, ": got ", value));
  }
  EXPECT_HAS(refusal(llama, R"({"num_key_value_heads": 3})"), "num_key_value_heads: got 3, wanted a divisor");
  EXPECT_HAS(refusal(llama, R"({"hidden_size": 65})"), "a divisor of hidden_size, 65");
  EXPECT_HAS(refusal(llama, R"({"rms_norm_eps": 0})"), "rms_norm_eps: got 0");
  EXPECT_HAS(refusal(llama, R"({"tie_word_embeddings": 1})"), "tie_word_embeddings: got 1");
  EXPECT_HAS(refusal(llama, R"({"eos_token_id": [1, "x"]})"), "eos_token_id");
  for (const char* head_dim : {"7", "12"})
    EXPECT_HAS(refusal<Unsupported>(llama, str("{\"head_dim\": ", head_dim, "}")), str("head_dim: got ", head_dim));
  EXPECT_HAS(refusal<Unsupported>(llama, R"({"hidden_act": "gelu"})"), "\"gelu\", wanted silu");
  EXPECT_HAS(refusal<Unsupported>(llama, R"({"quantization_config": {"quant_method": "gptq"}})"), "gptq");
}

TEST(ModelConfig, LoadsADirectory) {
  const TempDir dir;
  EXPECT_HAS(message_of<ModelLoadError>([&] { ModelConfig::load(dir.path()); }), "config.json");
  dir.write("config.json", config_json("LlamaForCausalLM", R"({"eos_token_id": 2})").dump());
  EXPECT_EQ(ModelConfig::load(dir.path()).eos_token_ids, std::vector<std::int32_t>{2});
  dir.write("generation_config.json", R"({"eos_token_id": [5, 6]})");
  EXPECT_EQ(ModelConfig::load(dir.path()).eos_token_ids, (std::vector<std::int32_t>{5, 6}));
  dir.write("generation_config.json", R"({"eos_token_id": [5, 1000000]})");  // no logit is of the second
  EXPECT_EQ(ModelConfig::load(dir.path()).eos_token_ids, std::vector<std::int32_t>{5});
  dir.write("generation_config.json", R"({"do_sample": true})");
  EXPECT_EQ(ModelConfig::load(dir.path()).eos_token_ids, std::vector<std::int32_t>{2});
  dir.write("generation_config.json", "[");
  EXPECT_HAS(message_of<ModelLoadError>([&] { ModelConfig::load(dir.path()); }), "generation_config.json");
}

TEST(Rotary, FillsTablesWithTheAngles) {
  const auto config = parse("LlamaForCausalLM");
  std::vector<float> cos(9 * 4, NAN), sin(9 * 4, NAN);
  fill_rotary_tables(config, {cos.data(), DType::kFloat32, {9, 4}}, {sin.data(), DType::kFloat32, {9, 4}});
  for (int position = 0; position < 9; ++position)
    for (int i = 0; i < 4; ++i) {
      const double angle = position * std::pow(10000.0, -2.0 * i / 8);
      EXPECT_NEAR(cos[position * 4 + i], std::cos(angle), 1e-6);
      EXPECT_NEAR(sin[position * 4 + i], std::sin(angle), 1e-6);
    }
  EXPECT_THROW(fill_rotary_tables(config, {cos.data(), DType::kFloat32, {9, 3}}, {sin.data(), DType::kFloat32, {9, 4}}),
               InvalidArgument);
}

// Limits of the formulas: the fastest pairs are left alone, the slowest are stretched by the whole factor.
TEST(Rotary, ScalesSlowPairsOnly) {
  RopeConfig plain;
  plain.original_max_position_embeddings = 1024;
  plain.factor = 8;
  const auto base = rotary_inverse_frequencies(plain, 128);
  for (const auto type : {RopeConfig::Type::kLlama3, RopeConfig::Type::kYarn}) {
    RopeConfig rope = plain;
    rope.type = type;
    const auto scaled = rotary_inverse_frequencies(rope, 128);
    EXPECT_EQ(scaled.front(), base.front());
    EXPECT_NEAR(scaled.back(), base.back() / 8, base.back() * 1e-6);
    for (std::size_t i = 1; i < scaled.size(); ++i) EXPECT_LT(scaled[i], scaled[i - 1]);
  }
  RopeConfig linear = plain;
  linear.type = RopeConfig::Type::kLinear;
  EXPECT_EQ(rotary_inverse_frequencies(linear, 128)[5], base[5] / 8);
}

}  // namespace
}  // namespace flexcore
