#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/philox.h"
#include "flexcore/engine.h"
#include "model/safetensors.h"
#include "temp_dir.h"
#include "test_device.h"

namespace flexcore {

inline constexpr std::int64_t kHidden = 32, kIntermediate = 48, kHeads = 4, kKvHeads = 2, kLayers = 3, kVocab = 50;

// A random Llama in float32, written once a test.
class EngineTest : public ::testing::Test {
 protected:
  EngineTest() {
    setenv("FLEXCORE_CACHE", dir_.path("cache").c_str(), 1);
    dir_.write("config.json", R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
      "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
      "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
      "hidden_act": "silu"})");
    add("model.embed_tokens.weight", kVocab, kHidden);
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      const std::int64_t kv = kHidden / kHeads * kKvHeads;
      add(prefix + "self_attn.q_proj.weight", kHidden, kHidden);
      add(prefix + "self_attn.k_proj.weight", kv, kHidden);
      add(prefix + "self_attn.v_proj.weight", kv, kHidden);
      add(prefix + "self_attn.o_proj.weight", kHidden, kHidden);
      add(prefix + "mlp.gate_proj.weight", kIntermediate, kHidden);
      add(prefix + "mlp.up_proj.weight", kIntermediate, kHidden);
      add(prefix + "mlp.down_proj.weight", kHidden, kIntermediate);
      add(prefix + "input_layernorm.weight", kHidden, 0);
      add(prefix + "post_attention_layernorm.weight", kHidden, 0);
    }
    add("model.norm.weight", kHidden, 0);
    std::vector<std::pair<std::string, TensorView>> tensors;
    for (auto& [name, shape, data] : tensors_) {
      const TensorView view = shape.second > 0 ? TensorView(data.data(), DType::kFloat32, {shape.first, shape.second})
                                               : TensorView(data.data(), DType::kFloat32, {shape.first});
      tensors.emplace_back(name, view);
    }
    write_safetensors(dir_.path("model.safetensors"), tensors);
  }

  static EngineConfig small(EngineConfig config = {}) {
    config.device = test::on_cpu() ? "cpu" : "cuda";
    config.dtype = "float32";
    config.max_model_len = 96;
    config.num_threads = 2;
    if (!config.kv_cache_memory_bytes) config.max_num_seqs = 8;
    config.slo = {.tpot_ms = 1e6, .ttft_ms = 1e6};  // what a step holds does not depend on how fast this machine is
    return config;
  }
  Engine load(const EngineConfig& config = {}) { return Engine::load(path(), small(config)); }
  std::string path() const { return dir_.path(); }

  static std::vector<std::int32_t> tokens(std::int64_t count, std::uint64_t seed) {
    std::vector<std::int32_t> ids;
    for (std::int64_t i = 0; i < count; ++i)
      ids.push_back(static_cast<std::int32_t>(random_bits(seed, static_cast<std::uint64_t>(i)) % kVocab));
    return ids;
  }
  static std::vector<Example> examples(std::int64_t count) {
    std::vector<Example> result;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto ids = tokens(7 + 11 * i % 40, static_cast<std::uint64_t>(100 + i));
      result.push_back({ids, ids});
    }
    return result;
  }
  // Runs until nothing is left; tokens by request.
  static std::map<RequestId, std::vector<std::int32_t>> drain(Engine& engine,
                                                              std::vector<FinetuneEvent>* events = nullptr) {
    std::map<RequestId, std::vector<std::int32_t>> out;
    for (int steps = 0; engine.has_work(); ++steps) {
      EXPECT_LT(steps, 20000);
      if (steps >= 20000) break;
      auto report = engine.step();
      for (const auto& event : report.outputs)
        if (event.token_id >= 0) out[event.request_id].push_back(event.token_id);
      if (events != nullptr) events->insert(events->end(), report.finetune.begin(), report.finetune.end());
    }
    return out;
  }

  TempDir dir_;

 private:
  void add(const std::string& name, std::int64_t rows, std::int64_t columns) {
    std::vector<float> data(static_cast<std::size_t>(rows * std::max<std::int64_t>(columns, 1)));
    for (std::size_t i = 0; i < data.size(); ++i) {
      const auto draw = static_cast<float>(uniform(std::hash<std::string>{}(name), i)) - 0.5f;
      data[i] = columns == 0 ? 1.0f + 0.2f * draw : 0.3f * draw;
    }
    tensors_.emplace_back(name, std::pair(rows, columns), std::move(data));
  }
  std::vector<std::tuple<std::string, std::pair<std::int64_t, std::int64_t>, std::vector<float>>> tensors_;
};

}  // namespace flexcore
