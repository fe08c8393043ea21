"""Dequantised tensors, written one by one under Hugging Face names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexcore._core import ModelLoadError, Unsupported
from flexcore.gguf.metadata import Metadata

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_CHUNK = 1 << 22  # elements dequantised at a time: 16 MiB of float32

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = ("rope_freqs.weight",)  # already in config.json


def write_weights(
    metadata: Metadata, path: Path, dtype: str, progress: Callable[[int, int], None] | None = None
) -> None:
    code, item = DTYPES[dtype]
    names = {name: _hugging_face_name(metadata, name) for name in metadata.tensors if name not in _IGNORED}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, target in names.items():
        shape = _shape(metadata, name)
        size = int(np.prod(shape)) * item
        header[target] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for rows in _rows(metadata, name):
                done += file.write(_encode(rows, dtype).data.cast("B"))
                if progress:
                    progress(done, offset)
        file.flush()
        os.fsync(file.fileno())


def _hugging_face_name(metadata: Metadata, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _BLOCK:
        raise Unsupported(f"{metadata.path}: the tensor {name} has no place in a {metadata.architecture} model")
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"


def _shape(metadata: Metadata, name: str) -> list[int]:
    return [int(size) for size in reversed(metadata.tensors[name].shape)]  # GGUF counts from the fastest dimension


def _rows(metadata: Metadata, name: str) -> Iterator[NDArray[np.float32]]:
    """The tensor in float32, some rows at a time."""
    from gguf import quants

    tensor, shape = metadata.tensors[name], _shape(metadata, name)
    heads = _permuted_heads(metadata, name)
    # A head's rows are interleaved, so a permuted tensor is cut between heads.
    unit = shape[0] // heads if heads else 1
    step = max(1, _CHUNK // (int(np.prod(shape[1:])) * unit)) * unit
    for begin in range(0, shape[0], step):
        try:
            rows = quants.dequantize(tensor.data[begin : begin + step], tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelLoadError(f"{metadata.path}: {name}: {error}") from error
        if heads:
            rows = rows.reshape(-1, unit // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(-1, *shape[1:])
        yield np.ascontiguousarray(rows, dtype=np.float32)


def _permuted_heads(metadata: Metadata, name: str) -> int:
    """llama.cpp stores the rotary halves of llama's q and k interleaved; heads to undo that for, or 0."""
    if metadata.architecture not in ("llama", "mistral"):
        return 0
    heads = int(metadata.need("attention.head_count"))
    if re.search(r"\.attn_q\.(weight|bias)$", name):
        return heads
    if re.search(r"\.attn_k\.(weight|bias)$", name):
        return int(metadata.of_model("attention.head_count_kv", heads))
    return 0


def _encode(rows: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "float32":
        return rows
    if dtype == "float16":
        return rows.astype(np.float16)
    bits = rows.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    rounded[np.isnan(rows)] = 0x7FC0
    return rounded
