"""A Llama-shaped model with random bfloat16 weights, made in place: benchmarks without a download.

python bench/random_model.py llama-3.2-1b build/models/llama-3.2-1b
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from flexcore.bench._shapes import PRESETS, Shape


def config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.wide,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def tensors(shape: Shape, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """By file: the embedding and the head, then each layer. Products of unit rows stay near one."""
    source = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return made.normal_(0, 1 / math.sqrt(columns), generator=source).cpu()

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    first = {"model.embed_tokens.weight": matrix(shape.vocab_size, shape.hidden), "model.norm.weight": ones}
    if not shape.tied:
        first["lm_head.weight"] = matrix(shape.vocab_size, shape.hidden)
    yield first
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        sizes = {
            "self_attn.q_proj": (shape.q, shape.hidden),
            "self_attn.k_proj": (shape.kv, shape.hidden),
            "self_attn.v_proj": (shape.kv, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.q),
            "mlp.gate_proj": (shape.wide, shape.hidden),
            "mlp.up_proj": (shape.wide, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.wide),
        }
        made = {f"{prefix}{name}.weight": matrix(*size) for name, size in sizes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        yield made | {f"{prefix}{name}.weight": ones.clone() for name in norms}


def main() -> int:
    llamas = [name for name, shape in PRESETS.items() if not (shape.qkv_bias or shape.qk_norm)]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=llamas)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num-layers", type=int, metavar="N", help="fewer than the preset's: a layer costs the same")
    args = parser.parse_args()
    if (args.directory / "config.json").exists():
        return 0
    args.directory.mkdir(parents=True, exist_ok=True)
    shape = PRESETS[args.preset]
    shape = dataclasses.replace(shape, num_layers=args.num_layers or shape.num_layers)
    index: dict[str, str] = {}
    for number, part in enumerate(tensors(shape, "cuda" if torch.cuda.is_available() else "cpu")):
        name = f"model-{number:05d}.safetensors"
        save_file(part, args.directory / name)
        index |= dict.fromkeys(part, name)
    (args.directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (args.directory / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n")  # last: it is whole now
    return 0


if __name__ == "__main__":
    sys.exit(main())
