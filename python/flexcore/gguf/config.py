"""config.json and generation_config.json from GGUF keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flexcore._core import Unsupported
from flexcore.gguf.metadata import Metadata

_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
# Tokens that end a chat turn whatever the file calls its end of sequence.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")


def model_config(metadata: Metadata, dtype: str) -> dict[str, Any]:
    window = metadata.of_model("attention.sliding_window")
    mistral = metadata.architecture == "llama" and window  # llama.cpp files Mistral under llama
    name, model_type = _CLASSES["mistral" if mistral else metadata.architecture]
    hidden, heads = int(metadata.need("embedding_length")), int(metadata.need("attention.head_count"))
    head_dim = metadata.of_model("attention.key_length") or metadata.of_model("rope.dimension_count") or hidden // heads
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": int(metadata.need("feed_forward_length")),
        "num_hidden_layers": int(metadata.need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.of_model("attention.head_count_kv", heads)),
        "head_dim": int(head_dim),
        "vocab_size": int(metadata.tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": int(metadata.need("context_length")),
        # The file holds a float32; the shortest decimal that means the same is what the model's author wrote.
        "rms_norm_eps": float(str(np.float32(metadata.need("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(metadata.of_model("rope.freq_base", 10000.0)),
        "rope_scaling": rope_scaling(metadata, int(head_dim)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in metadata.tensors,
        "torch_dtype": dtype,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
    }
    if model_type == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in metadata.tensors, "mlp_bias": False}
    elif model_type == "mistral":
        config["sliding_window"] = None if window is None else int(window)
    elif model_type == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in metadata.tensors
    if model_type.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def generation_config(metadata: Metadata) -> dict[str, Any]:
    ends = [metadata.token_id(role) for role in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template") or ""
    wanted = [text for text in _TURN_ENDS if text in template]
    if wanted:
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        ends += [tokens.index(text) for text in wanted if text in tokens]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": unique[0] if len(unique) == 1 else unique,
        "pad_token_id": metadata.token_id("padding"),
    }
    return {key: value for key, value in config.items() if value not in (None, [])}


def rope_scaling(metadata: Metadata, head_dim: int) -> dict[str, Any] | None:
    if "rope_freqs.weight" in metadata.tensors:
        return _llama3_scaling(metadata, head_dim)
    kind = metadata.of_model("rope.scaling.type", "none")
    factor = metadata.of_model("rope.scaling.factor") or metadata.of_model("rope.scale_linear")
    if kind == "none" and not factor:
        return None
    if kind in ("none", "linear"):
        return None if factor in (None, 1.0) else {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        original = int(metadata.of_model("rope.scaling.original_context_length", metadata.need("context_length")))
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
    raise Unsupported(f"{metadata.path}: rope scaling of type {kind!r}")


def _llama3_scaling(metadata: Metadata, head_dim: int) -> dict[str, Any]:
    """llama.cpp stores Llama 3.1's frequency divisors; Hugging Face stores the four numbers that they come from."""
    divisors = np.asarray(metadata.tensors["rope_freqs.weight"].data, dtype=np.float64)
    theta = float(metadata.of_model("rope.freq_base", 10000.0))
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / 3.0, 0.0, 1.0)
    if divisors.shape != smooth.shape or not np.allclose(
        divisors, 1 / ((1 - smooth) / divisors.max() + smooth), rtol=1e-3
    ):
        raise Unsupported(f"{metadata.path}: rope_freqs.weight is not of Llama 3.1's form")
    return scaling
