"""What quantised linears are worth, in numpy; and transformers models that hold just that."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
FORMATS = ("int8", "int4", "nf4")


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def dequantized(weight: np.ndarray, quantization: str, group_size: int = 64) -> np.ndarray:
    """A matrix [out_features, in_features] after quantisation, float32."""
    out = np.empty(weight.shape, np.float32)
    for begin in range(0, weight.shape[1], group_size):
        group = weight[:, begin : begin + group_size].astype(np.float32)
        if quantization == "nf4":
            absmax = np.abs(group).max(axis=1, keepdims=True)
            scaled = group / np.where(absmax > 0, absmax, np.float32(1))
            codes = np.searchsorted((NF4[1:] + NF4[:-1]) * np.float32(0.5), scaled, side="left")
            out[:, begin : begin + group_size] = NF4[codes] * absmax
            continue
        levels = np.float32(255 if quantization == "int8" else 15)
        low = bfloat16(group.min(axis=1, keepdims=True))
        scale = bfloat16(np.maximum((group.max(axis=1, keepdims=True) - low) / levels, np.float32(0)))
        codes = np.clip(np.rint((group - low) / np.where(scale > 0, scale, np.float32(1))), 0, levels)
        out[:, begin : begin + group_size] = low + codes * scale
    return out


def quantized_hf(hf: Any, quantization: str, group_size: int = 64) -> Any:
    """A copy whose linears in the layers are worth what quantised ones are."""
    import torch

    model = copy.deepcopy(hf)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(dequantized(module.weight.numpy(), quantization, group_size)))
    return model
