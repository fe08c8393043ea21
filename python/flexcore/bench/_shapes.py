"""Shapes of decoders, of which the work of a step follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What a decoder's kernels depend on."""

    name: str
    num_layers: int
    hidden: int
    wide: int  # intermediate_size
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Of the linears."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.wide)

    @property
    def multiplied_parameters(self) -> int:
        """Those that every token is multiplied with."""
        return self.num_layers * self.layer_parameters + self.vocab_size * self.hidden

    @staticmethod
    def from_config(name: str, config: Mapping[str, Any]) -> Shape:
        """From a Hugging Face config.json."""
        heads, hidden, kind = config["num_attention_heads"], config["hidden_size"], config.get("model_type", "llama")
        return Shape(
            name,
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
            kind == "qwen2" or bool(config.get("attention_bias", False)),
            kind == "qwen3",
        )


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama-3.2-3b", 28, 3072, 8192, 24, 8, 128, 128256, tied=True),
        Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        Shape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
        Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
        Shape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    )
}
