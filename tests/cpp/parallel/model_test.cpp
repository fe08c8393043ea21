#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

#include "compile/passes.h"
#include "model/archs/archs.h"
#include "parallel/model_run.h"
#include "peft/attach.h"
#include "peft/layout.h"

namespace flexcore {
namespace {

using test::Block;
using test::ModelRun;
using test::Ranks;
using test::relative_error;

constexpr double kTolerance = 2e-5;  // norm-wise, DESIGN section 4
constexpr std::int64_t kRank = 5;

ModelConfig small_config(Architecture architecture, std::int64_t num_heads, std::int64_t num_kv_heads, int num_layers) {
  ModelConfig config;
  config.architecture = architecture;
  config.hidden_size = 20;
  config.intermediate_size = 24;
  config.num_layers = num_layers;
  config.num_heads = num_heads;
  config.num_kv_heads = num_kv_heads;
  config.head_dim = 4;
  config.vocab_size = 37;  // divides by none of the rank counts
  config.max_position_embeddings = 64;
  config.qk_norm = architecture == Architecture::kQwen3;
  config.tie_word_embeddings = architecture != Architecture::kQwen3;
  config.sliding_window.assign(static_cast<std::size_t>(num_layers), 0);
  return config;
}

struct Model {
  Model(Architecture architecture, std::int64_t num_heads, std::int64_t num_kv_heads, int num_layers)
      : config(small_config(architecture, num_heads, num_kv_heads, num_layers)),
        graph(build_model(config, DType::kFloat32)) {}
  ModelConfig config;
  Graph graph;
};

std::vector<std::int32_t> some_tokens(std::int64_t count) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<std::int32_t>((i * i * 7 + 3 * i + 5) % 37));
  return tokens;
}

BypassForm lora_of(const LinearSite& site) { return lora_form(site.in_features, site.out_features, kRank); }

std::vector<Block> lora_weights(const LinearSite& site, SiteId id) {
  std::mt19937 rng(static_cast<unsigned>(100 + id));
  const auto scale = [](std::int64_t in) { return 1.0f / std::sqrt(static_cast<float>(in)); };
  return {Block::random(kRank, site.in_features, rng, scale(site.in_features)),
          Block::random(site.out_features, kRank, rng, scale(kRank))};
}

/// Every plan of a LoRA at every site.
std::vector<std::vector<BypassPlan>> all_plans(const Graph& graph, const ParallelBackbone& backbone) {
  std::vector<std::vector<BypassPlan>> plans;
  for (std::size_t i = 0; i < graph.layer_sites().size(); ++i)
    plans.push_back(enumerate_plans(lora_of(graph.sites[i]), site_states(graph, backbone, static_cast<SiteId>(i))));
  return plans;
}

// A LoRA at every site, with the n-th of its plans, begun again where there are fewer.
void attach_all(ModelRun& run, const Graph& graph, const std::vector<std::vector<BypassPlan>>& plans, std::size_t n) {
  run.detach_all();
  for (std::size_t i = 0; i < graph.layer_sites().size(); ++i) {
    const auto id = static_cast<SiteId>(i);
    run.attach(id, lora_of(graph.sites[i]), plans[i][n % plans[i].size()], lora_weights(graph.sites[i], id));
  }
}

double worst_error(const ModelRun::Result& got, const ModelRun::Result& want) {
  double worst = 0;
  const auto compare = [&](const Block& a, const Block& b) { worst = std::max(worst, relative_error(a, b)); };
  compare(got.hidden, want.hidden);
  compare(got.logits, want.logits);
  compare(got.losses, want.losses);
  compare(got.grad_input, want.grad_input);
  EXPECT_EQ(got.weight_gradients.size(), want.weight_gradients.size());
  for (const auto& [site, gradients] : want.weight_gradients)
    for (std::size_t i = 0; i < gradients.size(); ++i) compare(got.weight_gradients.at(site)[i], gradients[i]);
  return worst;
}

void expect_planned_bytes(const ModelRun& run, const Ranks& ranks, std::int64_t num_tokens) {
  for (int r = 0; r < ranks.count(); ++r)
    ASSERT_EQ(ranks.sent[static_cast<std::size_t>(r)], run.planned_bytes(r, num_tokens)) << "rank " << r;
}

ModelRun::Result on_one_rank(const Model& model, const std::vector<std::int32_t>& tokens, bool with_lora) {
  Ranks one(1);
  ModelRun run(model.graph, model.config, {}, one);
  if (with_lora) attach_all(run, model.graph, all_plans(model.graph, run.backbone()), 0);
  return run.run(tokens);
}

struct Case {
  const char* name;
  Architecture architecture;
  std::int64_t num_heads, num_kv_heads;
  std::vector<int> ranks;
};
// Key and value heads that divide by the ranks, that do not, and that are fewer.
const std::vector<Case> kCases = {{"llama, 8 heads, 2 of keys", Architecture::kLlama, 8, 2, {1, 2, 4, 8}},
                                  {"qwen3, 6 heads, 3 of keys", Architecture::kQwen3, 6, 3, {1, 2, 3}},
                                  {"qwen2 with biases, 8 heads, 8 of keys", Architecture::kQwen2, 8, 8, {8}}};

TEST(ParallelModelTest, BackboneComputesWhatOneRankDoes) {
  auto cases = kCases;
  cases.push_back({"llama, one head of keys", Architecture::kLlama, 4, 1, {1, 2, 4}});
  cases.push_back({"qwen3, one head of keys", Architecture::kQwen3, 4, 1, {1, 2, 4}});
  for (const auto& c : cases)
    for (const std::int64_t num_tokens : {2, 7, 9}) {
      const Model model(c.architecture, c.num_heads, c.num_kv_heads, 2);
      const auto tokens = some_tokens(num_tokens);
      const auto want = on_one_rank(model, tokens, false);
      for (const int count : c.ranks)
        for (const bool split : {false, true}) {
          Ranks ranks(count);
          ModelRun run(model.graph, model.config, {count, split}, ranks);
          EXPECT_LT(worst_error(run.run(tokens), want), kTolerance) << c.name << ", " << count << " ranks, " << split;
          expect_planned_bytes(run, ranks, num_tokens);
        }
    }
}

// A decoder layer between embedding and loss; run n has every site's n-th candidate.
TEST(ParallelModelTest, EveryCandidateOfEverySiteInABlock) {
  for (const auto& c : kCases) {
    const Model model(c.architecture, c.num_heads, c.num_kv_heads, 1);
    const auto tokens = some_tokens(5);
    const auto want = on_one_rank(model, tokens, true);
    for (const int count : c.ranks)
      for (const bool split : {false, true}) {
        if (count == 1) continue;
        Ranks ranks(count);
        ModelRun run(model.graph, model.config, {count, split}, ranks);
        const auto plans = all_plans(model.graph, run.backbone());
        std::size_t most = 0;
        for (const auto& of_site : plans) most = std::max(most, of_site.size());
        EXPECT_GE(most, 800u);
        // With a split residual some: all of its candidates run alone in bypass_test.cpp.
        for (std::size_t n = 0; n < most; n += split ? 11 : 1) {
          attach_all(run, model.graph, plans, n);
          std::fill(ranks.sent.begin(), ranks.sent.end(), 0);
          ASSERT_LT(worst_error(run.run(tokens), want), kTolerance)
              << c.name << ", " << count << " ranks, candidate " << n << ", " << split;
          expect_planned_bytes(run, ranks, 5);
        }
      }
  }
}

// Three layers, with what each site's search chooses: for links that take long to begin, and for ones that do not.
TEST(ParallelModelTest, ChosenPlansOnAWholeModel) {
  for (const auto& c : kCases) {
    const Model model(c.architecture, c.num_heads, c.num_kv_heads, 3);
    const auto tokens = some_tokens(13);
    const auto want = on_one_rank(model, tokens, true);
    for (const int count : c.ranks)
      for (const double latency : {10e-6, 0.0}) {
        Ranks ranks(count);
        ModelRun run(model.graph, model.config, {count, false}, ranks);
        for (std::size_t i = 0; i < model.graph.layer_sites().size(); ++i) {
          const auto id = static_cast<SiteId>(i);
          const BypassForm form = lora_of(model.graph.sites[i]);
          const BypassSizes sizes{.tokens = 13, .tokens_per_step = 26, .x_bytes = 4, .y_bytes = 4};
          const auto choice = choose_plan(form, site_states(model.graph, run.backbone(), id), sizes, count,
                                          {.collective_seconds = latency});
          run.attach(id, form, choice.best().plan, lora_weights(model.graph.sites[i], id));
        }
        EXPECT_LT(worst_error(run.run(tokens), want), kTolerance) << c.name << ", " << count << " ranks";
        expect_planned_bytes(run, ranks, 13);
      }
  }
}

// Another form at every linear: down, relu, up. What the search leaves in no sum before the relu runs too.
TEST(ParallelModelTest, BottlenecksOnAWholeModel) {
  const Model model(Architecture::kQwen3, 6, 3, 2);
  const auto tokens = some_tokens(7);
  std::optional<ModelRun::Result> want;
  for (const int count : {1, 2, 3})
    for (const double latency : {10e-6, 0.0}) {
      Ranks ranks(count);
      ModelRun run(model.graph, model.config, {count, false}, ranks);
      for (std::size_t i = 0; i < model.graph.layer_sites().size(); ++i) {
        const auto& site = model.graph.sites[i];
        const auto id = static_cast<SiteId>(i);
        using Kind = BypassStep::Kind;
        const BypassForm form{{{Kind::kLinear, "down", site.in_features, kRank},
                               {Kind::kActivation, "relu", kRank, kRank},
                               {Kind::kLinear, "up", kRank, site.out_features}}};
        const auto choice =
            choose_plan(form, site_states(model.graph, run.backbone(), id), {}, count, {.collective_seconds = latency});
        auto weights = lora_weights(site, id);
        weights.insert(weights.begin() + 1, Block());
        run.attach(id, form, choice.best().plan, weights);
      }
      auto got = run.run(tokens);
      if (!want) want = got;
      for (auto* result : {&got, &*want})
        for (auto& [site, gradients] : result->weight_gradients)
          std::erase_if(gradients, [](const Block& b) { return b.data.empty(); });
      EXPECT_LT(worst_error(got, *want), kTolerance) << count << " ranks";
      expect_planned_bytes(run, ranks, 7);
    }
}

// Collectives carry elements of their tensor's dtype: of a bfloat16 model the hidden states are half as wide.
TEST(ParallelModelTest, BytesAreOfTheTensorsDtype) {
  const ModelConfig config = small_config(Architecture::kLlama, 8, 2, 2);
  const Graph graph = build_model(config, DType::kBFloat16);
  for (const bool split : {false, true}) {
    Ranks ranks(4);
    ModelRun run(graph, config, {4, split}, ranks);
    attach_all(run, graph, all_plans(graph, run.backbone()), 333);
    run.run(some_tokens(7));
    expect_planned_bytes(run, ranks, 7);
  }
}

// What the other tests compare with: the derivative of the loss along a direction, by differences.
TEST(ParallelModelTest, OneRanksGradientsAreDerivatives) {
  const Model model(Architecture::kQwen3, 6, 3, 2);
  const auto tokens = some_tokens(7);
  const auto loss_of = [&](float step, ModelRun::Result* result) {
    Ranks one(1);
    ModelRun run(model.graph, model.config, {}, one);
    const auto plans = all_plans(model.graph, run.backbone());
    for (std::size_t i = 0; i < model.graph.layer_sites().size(); ++i) {
      const auto id = static_cast<SiteId>(i);
      auto weights = lora_weights(model.graph.sites[i], id);
      std::mt19937 rng(static_cast<unsigned>(i));
      for (auto& weight : weights) {
        const Block direction = Block::random(weight.rows, weight.features, rng);
        for (std::size_t e = 0; e < weight.data.size(); ++e) weight.data[e] += step * direction.data[e];
      }
      run.attach(id, lora_of(model.graph.sites[i]), plans[i][0], weights);
    }
    auto made = run.run(tokens);
    double loss = 0;
    for (const float value : made.losses.data) loss += value;
    if (result != nullptr) *result = std::move(made);
    return loss;
  };
  ModelRun::Result result;
  loss_of(0, &result);
  double along = 0;
  for (const auto& [site, gradients] : result.weight_gradients) {
    std::mt19937 rng(static_cast<unsigned>(site));
    for (const auto& gradient : gradients)
      along += test::dot(gradient, Block::random(gradient.rows, gradient.features, rng));
  }
  const double difference = (loss_of(1e-3f, nullptr) - loss_of(-1e-3f, nullptr)) / 2e-3;
  EXPECT_NEAR(along, difference, 2e-3 * std::abs(difference));
}

std::string texts(const std::vector<ParallelState>& states) {
  std::string text;
  for (const auto state : states) text += (text.empty() ? "" : " ") + tensor_text(state);
  return text;
}

std::string site_text(const Graph& graph, const ParallelBackbone& backbone, const std::string& name) {
  for (std::size_t i = 0; i < graph.layer_sites().size(); ++i)
    if (graph.sites[i].path.ends_with(name)) {
      const SiteStates s = site_states(graph, backbone, static_cast<SiteId>(i));
      return "W" + weight_text(s.weight) + " x " + texts(s.x) + " y " + texts(s.y) + " back y " + texts(s.grad_y) +
             " x " + texts(s.grad_x);
    }
  return "no such site";
}

TEST(ParallelBackboneTest, MegatronsStates) {
  const Model model(Architecture::kLlama, 8, 2, 2);
  const auto two = parallelize_backbone(model.graph, {2, false});
  for (const char* name : {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
    EXPECT_EQ(site_text(model.graph, two, name), "W|out x = y |k back y |k x + =") << name;
  for (const char* name : {"o_proj", "down_proj"})
    EXPECT_EQ(site_text(model.graph, two, name), "W|in x |k y + = back y = x |k") << name;

  // Two key and value heads on four ranks: every rank makes both.
  const auto four = parallelize_backbone(model.graph, {4, false});
  EXPECT_EQ(site_text(model.graph, four, "q_proj"), "W|out x = y |k back y |k x + =");
  for (const char* name : {"k_proj", "v_proj"})
    EXPECT_EQ(site_text(model.graph, four, name), "W= x = y = back y + x + =") << name;

  const auto split = parallelize_backbone(model.graph, {2, true});
  EXPECT_EQ(site_text(model.graph, split, "gate_proj"), "W|out x |t = y |k back y |k x + |t");
  EXPECT_EQ(site_text(model.graph, split, "down_proj"), "W|in x |k y + |t back y |t = x |k");
}

// Where (IA)^3 has its vectors: a tensor that is multiplied where it lies.
TEST(ParallelBackboneTest, BypassesOfATensorToItself) {
  const Model model(Architecture::kLlama, 8, 2, 2);
  const auto text = [&](int ranks, const char* name) {
    const TensorId id = model.graph.find(1, name);
    const SiteStates s = bypass_states(model.graph, parallelize_backbone(model.graph, {ranks, false}), id, id);
    return texts(s.x) + ", " + texts(s.y) + ", " + texts(s.grad_y) + ", " + texts(s.grad_x);
  };
  EXPECT_EQ(text(2, "v"), "|k, |k, |k, |k");
  EXPECT_EQ(text(2, "mlp"), "|k, |k, |k, |k");
  EXPECT_EQ(text(4, "v"), "=, =, +, +");  // made on every rank; each has the gradient of the heads that it read
}

// Two all-reduces a layer and direction (Megatron-LM, figure 4), or as many reduce-scatters and all-gathers.
TEST(ParallelBackboneTest, CollectivesOfALayer) {
  const Model model(Architecture::kLlama, 8, 2, 3);
  for (const bool split : {false, true}) {
    std::map<std::pair<bool, std::string_view>, int> counts;
    for (const auto& moved : backbone_transitions(model.graph, parallelize_backbone(model.graph, {4, split})))
      if (model.graph.tensor(moved.tensor).layer == 1 && moved.transition.collective()) {
        ++counts[{moved.backward, transition_name(moved.transition.kind())}];
        EXPECT_EQ(moved.features, 20);
      }
    for (const bool backward : {false, true}) {
      if (split) {
        EXPECT_EQ((counts[{backward, "reduce-scatter"}]), 2);
        EXPECT_EQ((counts[{backward, "all-gather"}]), 2);
      } else {
        EXPECT_EQ((counts[{backward, "all-reduce"}]), 2);
      }
    }
    EXPECT_EQ(counts.size(), split ? 4u : 2u);
  }
}

// The backward of a transition is its adjoint, or less: of a gradient that is whole already no sum is taken.
TEST(ParallelBackboneTest, BackwardsAreAdjoints) {
  for (const int count : {2, 4})
    for (const bool split : {false, true}) {
      const Model model(Architecture::kLlama, 8, 2, 2);
      auto tensors = parallelize_backbone(model.graph, {count, split}).tensors;
      tensors.erase(tensors.begin());  // the embedding's: frozen, its gradient ends there
      std::size_t found = 0;
      for (const auto& tensor : tensors) {
        if (tensor.made == tensor.used || !tensor.grad_used) continue;
        const Transition adjoint = Transition{tensor.made, tensor.used}.adjoint();
        EXPECT_EQ(*tensor.grad_used, adjoint.to);
        EXPECT_TRUE(*tensor.grad_made == adjoint.from ||
                    (*tensor.grad_made == kReplicated && adjoint.from == kPending));
        ++found;
      }
      EXPECT_GE(found, split ? 9u : 4u);  // o and down of two layers; with a split residual their norms and the loss
    }
}

// With bypasses in it, and linears of one input as one node, a graph has the same states.
TEST(ParallelBackboneTest, OfAGraphWithLora) {
  const ModelConfig config = small_config(Architecture::kQwen3, 8, 2, 3);
  const Graph base = build_model(config, DType::kFloat32);
  Graph trunk = base;
  BypassSet everywhere;
  for (std::size_t i = 0; i < base.layer_sites().size(); ++i)
    everywhere.insert({static_cast<SiteId>(i), BypassKind::kLora});
  attach_bypasses(trunk, &everywhere);
  fuse_shared_inputs(trunk);
  for (const bool split : {false, true}) {
    const auto want = parallelize_backbone(base, {4, split}), got = parallelize_backbone(trunk, {4, split});
    EXPECT_EQ(want.params, got.params);
    for (const char* name : {"attention_norm", "q.norm.rotated", "k.norm.rotated", "v", "attention",
                             "attention_residual", "gate", "mlp", "hidden"})
      for (int layer = 0; layer < 3; ++layer) {
        const auto a = static_cast<std::size_t>(base.find(layer, name)),
                   b = static_cast<std::size_t>(trunk.find(layer, name));
        EXPECT_EQ(want.tensors.at(a).used, got.tensors.at(b).used) << name;
        EXPECT_EQ(want.tensors.at(a).grad_made, got.tensors.at(b).grad_made) << name;
      }
  }
}

// Gradients of copied keys stay sums through the rotation, to be taken with that of the hidden state.
TEST(ParallelBackboneTest, OneHeadOfKeysTakesNoSumOfItsOwn) {
  const Model model(Architecture::kLlama, 4, 1, 1);
  const auto plan = parallelize_backbone(model.graph, {4, false});
  for (const char* name : {"k", "k.rotated", "v"}) {
    const auto& tensor = plan.tensors.at(static_cast<std::size_t>(model.graph.find(0, name)));
    EXPECT_EQ(tensor.grad_made, kPending) << name;
    EXPECT_EQ(tensor.grad_used, kPending) << name;
  }
}

TEST(ParallelBackboneTest, WhatDoesNotDivideIsRefused) {
  const auto refusal = [](const Model& model, int ranks) {
    try {
      parallelize_backbone(model.graph, {ranks, false});
    } catch (const Unsupported& e) {
      return std::string(e.what());
    }
    return std::string("nothing");
  };
  const Model model(Architecture::kLlama, 8, 2, 1);
  EXPECT_EQ(refusal(model, 3),
            "tensor_parallel_size: 3 does not divide the 8 heads that model.layers.0.self_attn.q_proj.weight makes");
  const Model wide(Architecture::kLlama, 16, 16, 1);
  EXPECT_EQ(refusal(wide, 16),
            "tensor_parallel_size: 16 does not divide the 24 features that model.layers.0.mlp.gate_proj.weight makes");
  EXPECT_EQ(refusal(model, 8), "nothing");
  EXPECT_THROW(parallelize_backbone(model.graph, {0, false}), InvalidArgument);
}

}  // namespace
}  // namespace flexcore
