#include "model/archs/decoder.h"

#include <cmath>

namespace flexcore {

namespace {

TensorId attention_block(GraphBuilder& b, const ModelConfig& c, const DecoderTraits& traits, int layer,
                         const std::string& prefix, TensorId x) {
  const auto eps = static_cast<float>(c.rms_norm_eps);
  const std::string attn = prefix + "self_attn.";
  const TensorId n = b.rms_norm("attention_norm", x, b.vector(prefix + "input_layernorm.weight", c.hidden_size), eps);
  const std::int64_t q_width = c.num_heads * c.head_dim, kv_width = c.num_kv_heads * c.head_dim;
  TensorId q = b.linear(n, {"q", attn + "q_proj", q_width, traits.qkv_bias});
  TensorId k = b.linear(n, {"k", attn + "k_proj", kv_width, traits.qkv_bias});
  const TensorId v = b.linear(n, {"v", attn + "v_proj", kv_width, traits.qkv_bias});
  if (traits.qk_norm) {
    q = b.rms_norm("q.norm", q, b.vector(attn + "q_norm.weight", c.head_dim), eps);
    k = b.rms_norm("k.norm", k, b.vector(attn + "k_norm.weight", c.head_dim), eps);
  }
  q = b.rotary(q, c.num_heads);
  k = b.rotary(k, c.num_kv_heads);
  const AttentionShape shape{c.num_heads, c.num_kv_heads, c.head_dim,
                             static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim))),
                             c.sliding_window[static_cast<std::size_t>(layer)]};
  const TensorId o = b.attention("attention", q, k, v, shape);
  return b.linear_residual(o, x, {"attention_residual", attn + "o_proj", c.hidden_size, traits.output_bias});
}

TensorId mlp_block(GraphBuilder& b, const ModelConfig& c, const DecoderTraits& traits, const std::string& prefix,
                   TensorId x) {
  const std::string mlp = prefix + "mlp.";
  const TensorId n = b.rms_norm("mlp_norm", x, b.vector(prefix + "post_attention_layernorm.weight", c.hidden_size),
                                static_cast<float>(c.rms_norm_eps));
  const TensorId gate = b.linear(n, {"gate", mlp + "gate_proj", c.intermediate_size, traits.mlp_bias});
  const TensorId up = b.linear(n, {"up", mlp + "up_proj", c.intermediate_size, traits.mlp_bias});
  const TensorId h = b.silu_mul("mlp", gate, up);
  return b.linear_residual(h, x, {"hidden", mlp + "down_proj", c.hidden_size, traits.mlp_bias});
}

}  // namespace

Graph build_decoder(const ModelConfig& config, const DecoderTraits& traits, DType compute) {
  GraphBuilder b(compute);
  const ParamId embedding = b.matrix("model.embed_tokens.weight", config.vocab_size, config.hidden_size);
  TensorId x = b.embedding("embedding", embedding);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    b.begin_layer(layer);
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    x = attention_block(b, config, traits, layer, prefix, x);
    x = mlp_block(b, config, traits, prefix, x);
  }
  const ParamId head =
      config.tie_word_embeddings ? embedding : b.matrix("lm_head.weight", config.vocab_size, config.hidden_size);
  b.heads(x, b.vector("model.norm.weight", config.hidden_size), static_cast<float>(config.rms_norm_eps), head);
  return b.take();
}

}  // namespace flexcore
