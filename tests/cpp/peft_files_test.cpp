#include "peft/peft_files.h"

#include <cmath>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "core/json.h"
#include "flexcore/error.h"
#include "model/safetensors.h"
#include "peft/lora_matcher.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

const std::string kQ = "model.layers.0.self_attn.q_proj", kDown = "model.layers.11.mlp.down_proj";

const char *const kA = ".lora_A.weight", *const kB = ".lora_B.weight";

AdapterTensor tensor_of(const std::string& module, const char* suffix, std::vector<std::int64_t> shape, float first) {
  AdapterTensor tensor{{module, suffix, std::move(shape)}, {}};
  tensor.values.resize(static_cast<std::size_t>(tensor.array.size()));
  std::iota(tensor.values.begin(), tensor.values.end(), first);
  return tensor;
}

/// Both matrices of each module {path, rank, in, out}.
struct Lora {
  std::string module;
  std::int64_t rank, in, out;
};
std::vector<AdapterTensor> tensors_of(const std::vector<Lora>& modules) {
  std::vector<AdapterTensor> tensors;
  for (const auto& [module, rank, in, out] : modules) {
    tensors.push_back(tensor_of(module, kA, {rank, in}, 0.25f));
    tensors.push_back(tensor_of(module, kB, {out, rank}, -3.0f));
  }
  return tensors;
}

std::string name_of(const std::string& module, const char* suffix) { return peft_key({module, suffix, {}, 0}); }

bool targets(const LoraConfig& config, const std::string& path) { return resolve_lora(config, path).has_value(); }

TEST(LoraMatcher, MatchesNamesAtDots) {
  LoraConfig config{.target_modules = {"q_proj", "mlp.down_proj", "lm_head"}};
  EXPECT_TRUE(targets(config, kQ));
  EXPECT_TRUE(targets(config, kDown));
  EXPECT_TRUE(targets(config, "lm_head"));
  EXPECT_TRUE(targets(config, "q_proj"));
  EXPECT_FALSE(targets(config, "model.layers.0.self_attn.xq_proj"));
  EXPECT_FALSE(targets(config, "model.layers.0.mlp.up_proj"));
  EXPECT_FALSE(targets(config, "down_proj"));
}

TEST(LoraMatcher, MatchesWholePathsByRegularExpression) {
  LoraConfig config{.target_modules = {R"(model\.layers\.(0|1)\.self_attn\.[qv]_proj)"},
                    .target_modules_is_regex = true};
  EXPECT_TRUE(targets(config, kQ));
  EXPECT_FALSE(targets(config, "x." + kQ));
  EXPECT_FALSE(targets(config, "model.layers.0.self_attn.k_proj"));
  config.target_modules = {R"(^(?!.*vision).*\.(q_proj|k_proj)$)"};
  EXPECT_TRUE(targets(config, kQ));
  EXPECT_FALSE(targets(config, "vision." + kQ));
  // The form that Unsloth writes.
  config.target_modules = {R"((?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|)"
                           R"((?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj))))"};
  EXPECT_TRUE(targets(config, kQ));
  EXPECT_TRUE(targets(config, kDown));
  EXPECT_FALSE(targets(config, "model.layers.0.self_attn.o_proj"));
}

TEST(LoraMatcher, TakesAllLinearsButTheOutputLayer) {
  const LoraConfig config;
  EXPECT_TRUE(targets(config, kQ));
  EXPECT_FALSE(targets(config, "lm_head"));
}

TEST(LoraMatcher, TakesTheFirstPatternThatMatches) {
  LoraConfig config{.r = 8, .lora_alpha = 16};
  config.rank_pattern = {{"layers.0.self_attn.q_proj", 4}, {"q_proj", 2}, {R"(.*\.mlp\..*)", 32}, {"^q", 64}};
  config.alpha_pattern = {{"down_proj", 1.5}};
  const auto q = resolve_lora(config, kQ), other_q = resolve_lora(config, "model.layers.1.self_attn.q_proj");
  EXPECT_EQ(q->rank, 4);
  EXPECT_EQ(q->scaling, 4.0);
  EXPECT_EQ(other_q->rank, 2);
  const auto down = resolve_lora(config, kDown);
  EXPECT_EQ(down->rank, 32);
  EXPECT_EQ(down->alpha, 1.5);
  EXPECT_EQ(resolve_lora(config, "model.layers.0.self_attn.xq_proj")->rank, 8);
  config.use_rslora = true;
  EXPECT_DOUBLE_EQ(resolve_lora(config, kDown)->scaling, 1.5 / std::sqrt(32.0));
}

TEST(LoraMatcher, RefusesConfigsThatMakeNoSense) {
  const auto refusal = [](const LoraConfig& config) {
    return message_of<InvalidArgument>([&] { LoraMatcher m(config); });
  };
  EXPECT_HAS(refusal({.r = 0}), "r: 0");
  EXPECT_HAS(refusal({.lora_alpha = std::nan("")}), "lora_alpha");
  EXPECT_HAS(refusal({.rank_pattern = {{"q", 0}}}), "rank_pattern: q: 0");
  EXPECT_HAS(refusal({.rank_pattern = {{"q(", 2}}}), "rank_pattern: regular expression \"q(\"");
  EXPECT_HAS(refusal({.target_modules = {"*"}, .target_modules_is_regex = true}),
             "target_modules: regular expression \"*\"");
  EXPECT_HAS(refusal({.target_modules = {"((a?){99}){99}"}, .target_modules_is_regex = true}), "too large");
  EXPECT_HAS(refusal({.target_modules = {std::string(30000, 'a')}, .target_modules_is_regex = true}), "too large");
}

// Back-tracking would take longer than the universe has.
TEST(LoraMatcher, IsNotSlowedByHostilePatterns) {
  const LoraConfig config{.target_modules = {"(a*)*b"}, .target_modules_is_regex = true};
  EXPECT_FALSE(targets(config, std::string(1000, 'a')));
  EXPECT_THROW(targets(config, std::string(100000, 'a')), InvalidArgument);
  const LoraConfig deep{.target_modules = {"(a?){100}"}, .target_modules_is_regex = true};
  EXPECT_TRUE(targets(deep, std::string(100, 'a')));
}

class PeftFiles : public testing::Test {
 protected:
  PeftFiles() { write(R"({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]})"); }

  void write(const std::string& config) { dir_.write("adapter_config.json", config); }
  /// The valid configuration with one more member.
  void write_with(const std::string& member) {
    write(R"({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], )" + member + "}");
  }
  void write_tensors(const std::vector<std::pair<std::string, TensorView>>& tensors) {
    write_safetensors(dir_.path("adapter_model.safetensors"), tensors);
  }
  void write_default_tensors() {
    write_tensors({{name('A'), {values_, DType::kFloat32, {2, 3}}}, {name('B'), {values_, DType::kFloat32, {4, 2}}}});
  }
  static std::string name(char factor) { return name_of(kQ, factor == 'A' ? kA : kB); }
  LoraConfig lora() { return std::get<LoraConfig>(read_peft(dir_.path()).config); }

  template <class E = ModelLoadError>
  std::string refusal() {
    return message_of<E>([&] { read_peft(dir_.path()); });
  }

  static void expect_same_tensors(const PeftAdapter& back, const std::vector<AdapterTensor>& wanted) {
    ASSERT_EQ(back.tensors.size(), wanted.size());
    for (const auto& tensor : wanted) {
      const auto* found = back.find(tensor.array.module, tensor.array.suffix);
      ASSERT_NE(found, nullptr) << peft_key(tensor.array);
      EXPECT_EQ(found->array.shape, tensor.array.shape);
      EXPECT_EQ(found->values, tensor.values);
    }
  }

  TempDir dir_;
  float values_[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
};

TEST_F(PeftFiles, ReadsWhatItWrites) {
  LoraConfig config{.r = 4, .lora_alpha = 8.5, .use_rslora = true};
  config.target_modules = {"q_proj", "down_proj"};
  config.rank_pattern = {{"down_proj", 2}, {".*a", 3}};
  config.alpha_pattern = {{"z", 16.0}, {"a", 0.5}};
  config.lora_dropout = 0.125;
  const auto tensors = tensors_of({{kQ, 4, 6, 5}, {kDown, 2, 3, 7}});
  const auto path = dir_.path("deep/adapter");
  write_peft(path, config, tensors, "some/base");
  const auto back = read_peft(path);
  const auto& lora = std::get<LoraConfig>(back.config);
  EXPECT_EQ(lora.r, 4);
  EXPECT_EQ(lora.lora_alpha, 8.5);
  EXPECT_TRUE(lora.use_rslora);
  EXPECT_EQ(lora.target_modules, (std::vector<std::string>{"down_proj", "q_proj"}));
  EXPECT_EQ(lora.rank_pattern, config.rank_pattern);
  EXPECT_EQ(lora.alpha_pattern, config.alpha_pattern);
  EXPECT_EQ(back.base_model, "some/base");
  EXPECT_EQ(lora.lora_dropout, 0.125);
  expect_same_tensors(back, tensors);
}

TEST_F(PeftFiles, ReadsTheOtherMethodsThatItWrites) {
  LoraConfig dora{.r = 2, .target_modules = {"q_proj"}, .use_dora = true};
  auto tensors = tensors_of({{kQ, 2, 6, 5}});
  tensors.push_back(tensor_of(kQ, ".lora_magnitude_vector", {5}, 1.0f));
  write_peft(dir_.path("dora"), dora, tensors);
  const auto dora_back = read_peft(dir_.path("dora"));
  EXPECT_TRUE(std::get<LoraConfig>(dora_back.config).use_dora);
  expect_same_tensors(dora_back, tensors);

  IA3Config ia3{.target_modules = {"q_proj", "down_proj"}, .feedforward_modules = {"down_proj"}};
  tensors = {tensor_of(kQ, ".ia3_l", {5, 1}, 0.5f), tensor_of(kDown, ".ia3_l", {1, 3}, 1.5f)};
  write_peft(dir_.path("ia3"), ia3, tensors);
  const auto ia3_back = read_peft(dir_.path("ia3"));
  EXPECT_EQ(std::get<IA3Config>(ia3_back.config).feedforward_modules, ia3.feedforward_modules);
  EXPECT_EQ(std::get<IA3Config>(ia3_back.config).target_modules, (std::vector<std::string>{"down_proj", "q_proj"}));
  expect_same_tensors(ia3_back, tensors);

  BottleneckConfig bottleneck{
      .bottleneck_size = 2, .non_linearity = "gelu", .scaling = 0.5, .use_parallel_adapter = true};
  tensors = {tensor_of(kDown, ".adapter_down.weight", {2, 3}, 0.5f),
             tensor_of(kDown, ".adapter_up.weight", {7, 2}, 1.5f)};
  write_peft(dir_.path("bottleneck"), bottleneck, tensors);
  const auto bottleneck_back = read_peft(dir_.path("bottleneck"));
  const auto& read = std::get<BottleneckConfig>(bottleneck_back.config);
  EXPECT_EQ(read.bottleneck_size, 2);
  EXPECT_EQ(read.non_linearity, "gelu");
  EXPECT_EQ(read.scaling, 0.5);
  EXPECT_TRUE(read.use_parallel_adapter);
  expect_same_tensors(bottleneck_back, tensors);
}

TEST_F(PeftFiles, EveryModuleHasAllItsTensors) {
  write_peft(dir_.path("x"), BottleneckConfig{}, std::vector{tensor_of(kDown, ".adapter_up.weight", {7, 2}, 1.5f)});
  EXPECT_HAS(message_of<ModelLoadError>([&] { read_peft(dir_.path("x")); }),
             "no tensor " + name_of(kDown, ".adapter_down.weight"));
  write_peft(dir_.path("y"), IA3Config{}, tensors_of({{kDown, 2, 6, 5}}));
  EXPECT_HAS(message_of<Unsupported>([&] { read_peft(dir_.path("y")); }), "wanted base_model.model.<module>.ia3_l");
}

TEST_F(PeftFiles, WritesAllLinearByName) {
  const LoraConfig config{.r = 2};
  write_peft(dir_.path("x"), config, tensors_of({{kQ, 2, 6, 5}, {kDown, 2, 3, 7}}));
  const Json json = Json::parse(dir_.read("x/adapter_config.json"));
  EXPECT_EQ(json.find("target_modules")->dump(), R"(["down_proj","q_proj"])");
  EXPECT_TRUE(json.find("lora_alpha")->is_int());
  EXPECT_TRUE(json.find("base_model_name_or_path")->is_null());
}

TEST_F(PeftFiles, KeepsTheOldAdapterWhenWritingFails) {
  write_default_tensors();
  auto broken = tensors_of({{kQ, 2, 6, 5}});
  broken[0].values.pop_back();
  EXPECT_HAS(message_of<InvalidArgument>([&] { write_peft(dir_.path(), {}, broken); }), "lora_A.weight: 11 values");
  EXPECT_EQ(read_peft(dir_.path()).tensors.size(), 2u);
  EXPECT_EQ(dir_.entries(), 2u);
}

TEST_F(PeftFiles, ReadsTargetsInEveryForm) {
  write_default_tensors();
  const auto config_of = [&](const char* targets) {
    write(str(R"({"peft_type": "LORA", "r": 2, "target_modules": )", targets, "}"));
    return lora();
  };
  EXPECT_EQ(config_of("\"All-Linear\"").target_modules, std::vector<std::string>{"all-linear"});
  const auto regex = config_of(R"(".*\\.q_proj")");
  EXPECT_TRUE(regex.target_modules_is_regex);
  EXPECT_EQ(regex.target_modules, std::vector<std::string>{R"(.*\.q_proj)"});
  EXPECT_EQ(config_of("null").target_modules, std::vector<std::string>{kQ});
  EXPECT_EQ(config_of(R"("all-linear", "exclude_modules": ["lm_head"])").target_modules, std::vector<std::string>{kQ});
  EXPECT_EQ(config_of("null").lora_alpha, 8.0);
  write(R"({"peft_type": "LORA", "r": 2, "target_modules": [1]})");
  EXPECT_HAS(refusal(), "target_modules: got [1]");
}

TEST_F(PeftFiles, IgnoresOptionsThatChangeNothing) {
  write_default_tensors();
  for (const char* member :
       {R"("task_type": "CAUSAL_LM")", R"("lora_dropout": 0.1)", R"("init_lora_weights": "gaussian")",
        R"("peft_version": "9")", R"("megatron_core": "megatron.core")", R"("use_dora": false)",
        R"("modules_to_save": null)", R"("bias": "none")", R"("layer_replication": [])", R"("new_option": {})",
        R"("qalora_group_size": 16)", R"("loftq_config": {"loftq_bits": 4})"}) {
    write_with(member);
    EXPECT_NO_THROW(read_peft(dir_.path())) << member;
  }
  write_with(R"("lora_dropout": 0.1)");
  EXPECT_EQ(lora().lora_dropout, 0.1);
}

TEST_F(PeftFiles, RefusesOtherOptionsByNameAndValue) {
  write_default_tensors();
  for (const char* member :
       {R"("bias": "all")", R"("layers_to_transform": [1])", R"("fan_in_fan_out": true)", R"("lora_bias": true)",
        R"("use_qalora": true)", R"("alora_invocation_tokens": [1])", R"("layer_replication": [[0, 1]])",
        R"("trainable_token_indices": [3])", R"("target_parameters": ["x"])", R"("new_option": "on")",
        R"("kasa_config": {"beta": 1})", R"("init_lora_weights": "pissa_niter_4")", R"("init_lora_weights": "olora")",
        R"("peft_type": "LOHA")"}) {
    write(std::string(R"({"r": 2, "target_modules": ["q_proj"], )") +
          (std::string_view(member).find("peft_type") == std::string::npos ? R"("peft_type": "LORA", )" : "") + member +
          "}");
    const std::string text = member, key = text.substr(1, text.find('"', 1) - 1);
    const auto message = refusal<Unsupported>();
    EXPECT_HAS(message, key + ": got ");
    EXPECT_HAS(message, Json::parse("{" + text + "}").as_object()[0].second.dump());
  }
}

TEST_F(PeftFiles, NamesValuesThatMakeNoSense) {
  write_default_tensors();
  for (const char* config :
       {R"({"peft_type": "LORA", "r": 0})", R"({"peft_type": "LORA", "r": "8"})", R"([])", "{",
        R"({"peft_type": "LORA", "r": 2, "lora_alpha": "x"})", R"({"peft_type": "LORA", "lora_dropout": 1})",
        R"({"peft_type": "LORA", "rank_pattern": {"a": 0}})", R"({"peft_type": "LORA", "rank_pattern": []})"}) {
    write(config);
    EXPECT_HAS(refusal(), "adapter_config.json");
  }
  write(R"({"peft_type": "LORA", "r": 2, "rank_pattern": {"(": 1}})");
  EXPECT_HAS(refusal<InvalidArgument>(), "\"(\"");
}

TEST_F(PeftFiles, RefusesTensorsThatDoNotFitTheConfig) {
  const TensorView a(values_, DType::kFloat32, {2, 3}), b(values_, DType::kFloat32, {4, 2});
  EXPECT_HAS(refusal(), "adapter_model.safetensors");
  write_tensors({});
  EXPECT_HAS(refusal(), "no tensors");
  write_tensors({{name('A'), a}});
  EXPECT_HAS(refusal(), "no tensor " + name('B'));
  write_tensors({{name('A'), a}, {name('B'), {values_, DType::kFloat32, {4, 3}}}});
  EXPECT_HAS(refusal(), name('B') + ": rank 3, wanted that of lora_A, 2");
  write_tensors({{name('A'), {values_, DType::kFloat32, {3, 3}}}, {name('B'), {values_, DType::kFloat32, {4, 3}}}});
  EXPECT_HAS(refusal(), name('A') + ": rank 3, wanted 2");
  write_tensors({{name('A'), {values_, DType::kFloat32, {6}}}, {name('B'), b}});
  EXPECT_HAS(refusal(), "wanted two dimensions");
  write_tensors({{name_of(kDown, kA), a}, {name_of(kDown, kB), b}});
  EXPECT_HAS(refusal(), kDown + " has weights");
  write_tensors({{"base_model.model." + kQ + ".lora_magnitude_vector", a}});
  EXPECT_HAS(refusal<Unsupported>(), "lora_magnitude_vector");
  values_[3] = std::numeric_limits<float>::quiet_NaN();
  write_default_tensors();
  EXPECT_HAS(refusal(), name('A') + ": holds NaN");
}

TEST_F(PeftFiles, ReadsHalfPrecision) {
  std::uint16_t a[] = {0x3f80, 0xc000, 0, 0x3e80, 0x0001, 0x8000};  // bfloat16
  std::uint16_t b[] = {0x3c00, 0xc000, 0x0001, 0x03ff, 0x7bff, 0x8000, 0x3555, 0x0400};
  write_tensors({{name('A'), {a, DType::kBFloat16, {2, 3}}}, {name('B'), {b, DType::kFloat16, {4, 2}}}});
  const auto adapter = read_peft(dir_.path());
  EXPECT_EQ(adapter.find(kQ, kA)->values, (std::vector<float>{1, -2, 0, 0.25f, 0x1p-133f, -0.0f}));
  EXPECT_EQ(adapter.find(kQ, kB)->values,
            (std::vector<float>{1, -2, 0x1p-24f, 1023 * 0x1p-24f, 65504, -0.0f, 1365 * 0x1p-12f, 0x1p-14f}));
  b[2] = 0x7c00;
  write_tensors({{name('A'), {a, DType::kBFloat16, {2, 3}}}, {name('B'), {b, DType::kFloat16, {4, 2}}}});
  EXPECT_HAS(refusal(), name('B'));
}

// PEFT saves the frozen output layer when an adapter targets it.
TEST_F(PeftFiles, PassesOverFrozenWeights) {
  const TensorView a(values_, DType::kFloat32, {2, 3}), b(values_, DType::kFloat32, {4, 2});
  const auto frozen = "base_model.model." + kQ + ".base_layer.weight";
  write_tensors({{frozen, {values_, DType::kFloat32, {4, 3}}}, {name('A'), a}, {name('B'), b}});
  EXPECT_EQ(read_peft(dir_.path()).tensors.size(), 2u);
  write_tensors({{frozen, {values_, DType::kFloat32, {4, 3}}}});
  EXPECT_HAS(refusal(), "no tensor " + name('A'));
}

TEST_F(PeftFiles, SaysWhatToDoWithPickles) {
  dir_.write("adapter_model.bin", "x");
  EXPECT_HAS(refusal<Unsupported>(), "adapter_model.bin");
}

}  // namespace
}  // namespace flexcore
