#include "flexcore/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "engine_fixture.h"
#include "flexcore/plan.h"

namespace flexcore {
namespace {

TEST_F(EngineTest, ServesWhileItTrainsAndGivesEverythingBack) {
  Engine engine = load();
  engine.create_adapter("a", {.r = 4, .lora_alpha = 8}, 1);
  engine.create_adapter("b", {.r = 2, .lora_alpha = 2, .target_modules = {"q_proj", "down_proj"}}, 2);
  std::vector<Request> requests;
  for (int i = 0; i < 6; ++i)
    requests.push_back({.prompt_token_ids = tokens(3 + 9 * i, static_cast<std::uint64_t>(i)),
                        .sampling = {.max_tokens = 20, .temperature = i % 2 ? 0.8 : 0.0, .ignore_eos = true, .seed = 7},
                        .adapter = i % 3 == 0   ? ""
                                   : i % 3 == 1 ? "a"
                                                : "b"});
  const auto quiet = [&] {
    const auto ids = engine.submit_batch(requests);
    auto out = drain(engine);
    std::vector<std::vector<std::int32_t>> result;
    for (const auto id : ids) result.push_back(out[id]);
    return result;
  };
  const auto alone = quiet();
  const JobId job = engine.finetune("a", examples(6), {.num_epochs = 2, .batch_size = 3, .learning_rate = 1e-2});
  const JobId other = engine.finetune("b", examples(4), {.batch_size = 2, .learning_rate = 1e-2, .optimizer = "sgd"});
  const auto ids = engine.submit_batch(requests);
  std::vector<FinetuneEvent> events;
  auto beside = drain(engine, &events);
  // Requests keep the version that they began with, so training beside them changes nothing.
  for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(beside[ids[i]], alone[i]) << i;
  EXPECT_EQ(engine.job(job).status, JobStatus::kSucceeded);
  EXPECT_EQ(engine.job(other).status, JobStatus::kSucceeded);
  EXPECT_EQ(engine.job(job).step, 4);
  EXPECT_EQ(events.size(), 6u);
  for (const auto& event : events) EXPECT_TRUE(std::isfinite(event.loss));
  engine.unload_adapter("a");
  engine.unload_adapter("b");
  const auto memory = engine.memory();
  for (const char* tag : {"saved_activations", "gradients", "optimizer", "adapters"})
    EXPECT_EQ(memory.at(tag), 0) << tag;
  EXPECT_EQ(engine.stats().at("kv_blocks_free"), engine.stats().at("kv_blocks"));
}

// Of every tensor, relative to its norm.
void expect_same_gradients(const LossAndGradients& got, const LossAndGradients& wanted, double tolerance = 2e-5) {
  ASSERT_EQ(got.gradients.size(), wanted.gradients.size());
  for (std::size_t t = 0; t < wanted.gradients.size(); ++t) {
    const auto &a = got.gradients[t].data, &b = wanted.gradients[t].data;
    ASSERT_EQ(a.size(), b.size()) << wanted.gradients[t].name;
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
      error += std::pow(a[i] - b[i], 2);
      norm += std::pow(b[i], 2);
    }
    EXPECT_GT(norm, 0) << wanted.gradients[t].name;
    EXPECT_LE(std::sqrt(error), tolerance * std::sqrt(norm)) << wanted.gradients[t].name;
  }
}

TEST_F(EngineTest, AnySplitGivesTheSameGradients) {
  Engine engine = load();
  engine.create_adapter("a", {.r = 4, .lora_alpha = 8}, 1);
  const JobId job = engine.finetune("a", examples(2), {.learning_rate = 0.05});  // B is no longer zero
  drain(engine);
  ASSERT_EQ(engine.job(job).status, JobStatus::kSucceeded);
  const auto some = examples(test::emulated() ? 3 : 5);
  const auto whole = engine.loss_and_gradients("a", some);
  for (const auto& [forward, backward] : {std::pair(1, 1), std::pair(5, 3), std::pair(16, 7)}) {
    if (test::emulated() && forward == 1) continue;
    const auto split = engine.loss_and_gradients("a", some, forward, backward);
    EXPECT_NEAR(split.loss, whole.loss, 1e-6);
    expect_same_gradients(split, whole);
  }
}

// Activations that are not kept are made again, on every device, whatever the windows.
TEST_F(EngineTest, RecomputingGivesTheSameGradients) {
  Engine engine = load();
  engine.create_adapter("a", {.r = 4, .lora_alpha = 8}, 1);
  engine.finetune("a", examples(2), {.learning_rate = 0.05});  // B is no longer zero
  drain(engine);
  const auto some = examples(2);
  const auto wanted = engine.loss_and_gradients("a", some, 5, 3);
  const MemoryPlan plan = flexcore::plan(path(), small(), LoraConfig{.r = 4}, 60);
  std::int64_t budget = plan.saved_activations / plan.tokens_in_flight * 60 * 2;
  int accepted = 0;
  for (; budget > 0; budget = test::emulated() ? budget / 3 : budget * 2 / 3) {
    engine.set_finetune_memory(budget);
    LossAndGradients got;
    try {
      got = engine.loss_and_gradients("a", some, 5, 3);
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("tokens keep at least"), std::string::npos) << error.what();
      break;
    }
    ++accepted;
    EXPECT_NEAR(got.loss, wanted.loss, 1e-6);
    SCOPED_TRACE(budget);
    expect_same_gradients(got, wanted);
  }
  EXPECT_GE(accepted, test::emulated() ? 2 : 3);
  EXPECT_GT(budget, 0);
}

// Of every method, trained a step so that nothing is zero: in splits too, and as on the CPU.
TEST_F(EngineTest, EveryMethodHasTheSameGradients) {
  EngineConfig on_cpu = small();
  on_cpu.device = "cpu";
  Engine engine = load(), reference = Engine::load(path(), on_cpu);
  const std::vector<std::pair<std::string, AdapterConfig>> methods = {
      {"dropout", LoraConfig{.r = 3, .lora_alpha = 6, .lora_dropout = 0.25}},
      {"dora", LoraConfig{.r = 3, .lora_alpha = 6, .use_dora = true}},
      {"dora, dropout", LoraConfig{.r = 3, .lora_alpha = 6, .lora_dropout = 0.25, .use_dora = true}},
      {"ia3", IA3Config{}},
      {"series", BottleneckConfig{.bottleneck_size = 5, .non_linearity = "gelu"}},
      {"parallel", BottleneckConfig{.bottleneck_size = 5, .use_parallel_adapter = true}},
      {"prompt", PromptTuningConfig{.num_virtual_tokens = 5}},
      {"prefix", PrefixTuningConfig{.num_virtual_tokens = 5}}};
  const auto some = examples(2);
  for (const auto& [name, config] : methods) {
    for (Engine* e : {&engine, &reference}) {
      e->create_adapter(name, config, 3);
      e->finetune(name, some, {.learning_rate = 0.02});
      drain(*e);
    }
    const auto whole = engine.loss_and_gradients(name, some, 0, 0, 7);
    ASSERT_FALSE(whole.gradients.empty());
    SCOPED_TRACE(name);
    expect_same_gradients(engine.loss_and_gradients(name, some, 5, 7, 7), whole);
    if (!test::on_cpu()) expect_same_gradients(whole, reference.loss_and_gradients(name, some, 0, 0, 7), 1e-4);
  }
  // All at once, each as alone.
  std::vector<Request> requests;
  for (const auto& [name, config] : methods)
    requests.push_back({.prompt_token_ids = tokens(6, requests.size()),
                        .sampling = {.max_tokens = 5, .temperature = 0.0, .ignore_eos = true},
                        .adapter = name});
  const auto ids = engine.submit_batch(requests);
  auto out = drain(engine);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const RequestId alone = engine.submit(requests[i]);
    EXPECT_EQ(drain(engine)[alone], out[ids[i]]) << methods[i].first;
  }
}

/// Bytes of one that holds a sequence of so many tokens and what it keeps for its backward.
std::int64_t smallest_pool(const std::string& model, EngineConfig config, std::int64_t length) {
  const std::int64_t page = 2 * kLayers * kKvHeads * (kHidden / kHeads) * 16 * 4;
  for (std::int64_t pool = page;; pool += page) {
    config.kv_cache_memory_bytes = pool;
    try {
      plan(model, config, LoraConfig{.r = 2}, length);
      return pool;
    } catch (const InvalidArgument&) {
    }
  }
}

TEST_F(EngineTest, SmallPoolPreemptsAndFinishesEverything) {
  const int count = test::emulated() ? 4 : 7;
  const std::int64_t pool = smallest_pool(path(), EngineTest::small(), 29);
  Engine large = load(), small = load({.kv_cache_memory_bytes = pool});
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i)
    requests.push_back({.prompt_token_ids = tokens(10 + i, static_cast<std::uint64_t>(i)),
                        .sampling = {.max_tokens = 5 * count + 5, .temperature = 0.0, .ignore_eos = true}});
  large.submit_batch(requests);
  small.submit_batch(requests);
  small.create_adapter("a", {.r = 2}, 1);
  const JobId job = small.finetune("a", examples(3), {.batch_size = 2});
  EXPECT_EQ(drain(small), drain(large));
  EXPECT_EQ(small.job(job).status, JobStatus::kSucceeded);
  auto stats = small.stats();
  EXPECT_GT(stats["preemptions"] + stats["finetune_restarts"] + stats["finetune_swaps"], 0);
}

TEST_F(EngineTest, RequestsGetThePagesOfBackwardPhases) {
  // What a sequence keeps is in host memory from the start; its keys and values go there too.
  EngineConfig config = EngineTest::small();
  config.swap_space_bytes = 1 << 20;
  const std::int64_t pool = smallest_pool(path(), config, 29);
  const FinetuneConfig job{.num_epochs = 2, .batch_size = 2, .learning_rate = 1e-2};
  std::vector<Example> all = examples(3);
  std::swap(all[0], all[2]);  // the longest first
  const std::vector<Request> requests = {
      {.prompt_token_ids = tokens(40, 1), .sampling = {.max_tokens = 8, .temperature = 0.0, .ignore_eos = true}}};
  // Alone and together: the same tokens and losses, whichever pages they were in.
  std::vector<std::vector<double>> losses;
  std::vector<std::map<RequestId, std::vector<std::int32_t>>> answers;
  for (const bool together : {false, true}) {
    Engine engine = load({.kv_cache_memory_bytes = pool, .swap_space_bytes = 1 << 20, .policy = "token-cap:5"});
    EXPECT_LE(engine.memory().at("swap_space"), 1 << 20);
    engine.create_adapter("a", {.r = 2}, 1);
    engine.finetune("a", {all[0], all[1]}, job);
    std::vector<FinetuneEvent> events;
    while (engine.step().num_backward_units == 0) {
    }
    if (!together) drain(engine, &events);
    engine.submit_batch(requests);
    answers.push_back(drain(engine, &events));
    auto& own = losses.emplace_back();
    for (const auto& event : events) own.push_back(event.loss);
    auto stats = engine.stats();
    EXPECT_EQ(stats["finetune_swaps"] > 0, together);
    EXPECT_EQ(stats["kv_blocks_swapped"] > 0, together);
    EXPECT_GT(engine.memory_peak().at("offloaded_activations"), 0);
    EXPECT_GT(stats["swap_blocks"], 0);
    EXPECT_EQ(stats["swap_blocks_free"], stats["swap_blocks"]);
    EXPECT_EQ(stats["kv_blocks_free"], stats["kv_blocks"]);
  }
  EXPECT_EQ(answers[0], answers[1]);
  ASSERT_EQ(losses[0].size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(losses[0][i], losses[1][i], 1e-4);
}

TEST_F(EngineTest, CheckpointGoesOnAsIfNothingHadHappened) {
  const FinetuneConfig config{
      .num_epochs = 3, .batch_size = 2, .learning_rate = 1e-2, .lr_scheduler = "cosine", .warmup_ratio = 0.3};
  std::vector<FinetuneEvent> straight, rest;
  Engine engine = load();
  engine.create_adapter("a", {.r = 4}, 3);
  const JobId job = engine.finetune("a", examples(5), config);
  const std::string checkpoint = dir_.path("checkpoint");
  while (engine.has_work()) {
    for (const auto& event : engine.step().finetune) {
      straight.push_back(event);
      if (event.step == 4) engine.save_checkpoint(job, checkpoint);
    }
  }
  Engine second = load();
  second.resume_finetune(checkpoint, examples(5));
  drain(second, &rest);
  ASSERT_EQ(rest.size() + 4, straight.size());
  for (std::size_t i = 0; i < rest.size(); ++i) {
    // Elsewhere how a sum is split depends on its batch, which depends on the time that steps take.
    EXPECT_NEAR(rest[i].loss, straight[i + 4].loss, test::on_cpu() ? 0 : 1e-4) << i;
    EXPECT_EQ(rest[i].learning_rate, straight[i + 4].learning_rate) << i;
  }
}

TEST_F(EngineTest, RefusesBadInputAndGoesOn) {
  Engine engine = load();
  EXPECT_THROW(engine.submit({}), InvalidArgument);
  EXPECT_THROW(engine.submit({.prompt_token_ids = {1, 99}}), InvalidArgument);
  EXPECT_THROW(engine.submit({.prompt_token_ids = {1}, .adapter = "none"}), InvalidArgument);
  EXPECT_THROW(engine.submit({.prompt_token_ids = tokens(96, 1)}), InvalidArgument);
  EXPECT_THROW(engine.create_adapter("a", {.r = 0}), InvalidArgument);
  engine.create_adapter("a", {.r = 1});
  EXPECT_THROW(engine.finetune("a", {{{1, 2, 3}, {1, 2}}}), InvalidArgument);
  EXPECT_THROW(engine.finetune("a", {{{1, 2, 3}, {-100, -100, -100}}}), InvalidArgument);
  EXPECT_THROW(Engine::load("/no/such/model"), ModelLoadError);
  const auto id = engine.submit({.prompt_token_ids = {1, 2, 3}, .max_tokens = 5});
  EXPECT_GE(drain(engine)[id].size(), 1u);
}

TEST_F(EngineTest, PlanSaysWhatTheLedgerMeasures) {
  const EngineConfig config = small();
  const LoraConfig lora{.r = 4};
  const MemoryPlan table = plan(path(), config, lora, 60);
  EXPECT_EQ(table.tokens_in_flight, 60 * 4);  // half of max_num_seqs
  Engine engine = load();
  engine.create_adapter("a", lora);
  EXPECT_EQ(2 * engine.memory().at("adapters"), table.adapters);
  const auto ids = tokens(60, 9);
  const JobId job = engine.finetune("a", std::vector<Example>(6, {ids, ids}), {.num_epochs = 2, .batch_size = 6});
  drain(engine);
  ASSERT_EQ(engine.job(job).status, JobStatus::kSucceeded);
  const auto peak = engine.memory_peak();
  EXPECT_EQ(peak.at("weights"), table.weights);
  EXPECT_EQ(peak.at("kv_pages"), table.kv_pages + table.saved_activations + table.gradients - table.adapters / 2);
  EXPECT_EQ(peak.at("saved_activations"), table.saved_activations);
  EXPECT_EQ(peak.at("adapters"), table.adapters);
  EXPECT_EQ(peak.at("gradients"), table.gradients);
  EXPECT_EQ(peak.at("optimizer"), table.optimizer);
  EXPECT_LE(peak.at("workspace"), table.workspace);
}

// What a device replays is what it would launch, whatever comes and goes: other numbers of rows, contexts that grow,
// adapters that change. On a device that records nothing, both engines do the same.
TEST_F(EngineTest, ReplayedStepsGiveTheTokensOfEagerOnes) {
  Engine replaying = load(), eager = load({.enforce_eager = true});
  std::map<RequestId, std::vector<std::int32_t>> out[2];
  std::map<RequestId, float> logprobs[2];
  JobId jobs[2];
  for (int which = 0; which < 2; ++which) {
    Engine& engine = which == 0 ? replaying : eager;
    engine.create_adapter("a", {.r = 4, .lora_alpha = 8}, 1);
    engine.create_adapter("b", {.r = 9, .lora_alpha = 9, .target_modules = {"q_proj", "down_proj"}}, 2);
    engine.finetune("a", examples(2), {.learning_rate = 0.05});  // B is no longer zero
    engine.finetune("b", examples(2), {.learning_rate = 0.05});
    drain(engine);
    for (int round = 0; round < 3; ++round) {
      for (int i = 0; i < (test::emulated() ? 4 : 8); ++i)
        engine.submit({.prompt_token_ids = tokens(2 + 5 * (i + round), static_cast<std::uint64_t>(i)),
                       .sampling = {.max_tokens = 4 + 3 * i, .temperature = 0.0, .ignore_eos = true},
                       .adapter = round == 0   ? ""
                                  : i % 3 == 0 ? ""
                                  : i % 3 == 1 ? "a"
                                               : "b"});
      if (round == 2) {
        jobs[which] = engine.finetune("a", examples(7), {.num_epochs = 2, .batch_size = 3, .learning_rate = 1e-2});
        engine.finetune("b", examples(3), {.batch_size = 3, .learning_rate = 1e-2});
      }
      while (engine.has_work())
        for (const auto& event : engine.step().outputs) {
          out[which][event.request_id].push_back(event.token_id);
          logprobs[which][event.request_id] += event.logprob;
        }
    }
  }
  EXPECT_EQ(out[0], out[1]);
  for (const auto& [id, sum] : logprobs[1]) EXPECT_NEAR(logprobs[0][id], sum, 1e-4 * (1 + std::abs(sum))) << id;
  EXPECT_EQ(replaying.job(jobs[0]).status, JobStatus::kSucceeded);
  EXPECT_NEAR(replaying.job(jobs[0]).loss, eager.job(jobs[1]).loss, 1e-4);
  const auto stats = replaying.stats();
  EXPECT_EQ(eager.stats().at("graphs_replayed"), 0);
  if (test::on_cpu()) return;
  EXPECT_GT(stats.at("graphs_replayed"), test::emulated() ? 20 : 40);
  EXPECT_LT(stats.at("graphs_recorded"), stats.at("graphs_replayed") / 2);
}

TEST_F(EngineTest, TwoEnginesRunAtOnce) {
  std::vector<std::map<RequestId, std::vector<std::int32_t>>> out(2);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 2; ++i)
    threads.emplace_back([&, i] {
      Engine engine = load();
      engine.submit(
          {.prompt_token_ids = tokens(20, 4), .sampling = {.temperature = 0.0, .ignore_eos = true}, .max_tokens = 30});
      out[i] = drain(engine);
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(out[0], out[1]);
  EXPECT_EQ(out[0].at(1).size(), 30u);
}

}  // namespace
}  // namespace flexcore
