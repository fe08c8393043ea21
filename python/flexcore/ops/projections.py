"""Linear layers, with and without LoRA."""

from __future__ import annotations

from typing import cast

from flexcore import _ops
from flexcore.ops._arrays import A, Array, dim, empty, give, shape_of, zeros


def linear(x: A, weight: Array, bias: Array | None = None) -> A:
    """y = x W^T + bias.

    x: [num_tokens, in_features] float
    weight: [out_features, in_features] float, contiguous; its dtype is that of the products
    bias: [out_features] float32, contiguous
    returns: [num_tokens, out_features], dtype of x
    """
    y = empty(x, dim(x, 0), dim(weight, 0))
    _ops.linear(x, weight, bias, y)
    return cast(A, give(x, y))


def linear_backward(grad_y: A, weight: Array) -> A:
    """Gradient of `linear` with respect to x: grad_y W. The weight is frozen and gets none.

    grad_y: [num_tokens, out_features] float
    weight: [out_features, in_features] float, contiguous
    returns: [num_tokens, in_features] float32
    """
    grad_x = empty(grad_y, dim(grad_y, 0), dim(weight, 1), dtype="float32")
    _ops.linear_backward(grad_y, weight, grad_x)
    return cast(A, give(grad_y, grad_x))


def lora_forward(
    x: A,
    weight: Array | None,
    lora_a: Array,
    lora_b: Array,
    scaling: float | Array,
    indptr: Array | None = None,
    adapter_ids: Array | None = None,
) -> A:
    """y = x W^T + scaling * (x A^T) B^T, each row with the adapter of its segment.

    x: [num_tokens, in_features] float
    weight: [out_features, in_features] float, contiguous; None: the bypass alone
    lora_a: [rank, in_features] or [num_adapters, rank, in_features] float32, contiguous; rank 1 to 256
    lora_b: [out_features, rank] or [num_adapters, out_features, rank] float32, contiguous
    scaling: alpha / rank, for all adapters or float32 [num_adapters]
    indptr: [num_segments + 1] int32, from 0 to num_tokens: segment i is rows indptr[i] to indptr[i+1]; None: one
        segment
    adapter_ids: [num_segments] int32, -1 for no adapter; None: segment i has adapter i
    returns: [num_tokens, out_features], dtype of x

    The intermediate x A^T is float32; in bfloat16 the sum is rounded once for the weight and once for the bypass.
    LoRA: Hu et al. 2021 (arXiv 2106.09685), section 4.1. Segments: Punica (arXiv 2310.18547), section 4.
    """
    y = empty(x, dim(x, 0), dim(lora_b, -2))
    _ops.lora_forward(x, weight, lora_a, lora_b, scaling, indptr, adapter_ids, y)
    return cast(A, give(x, y))


def lora_backward(
    grad_y: A,
    x: Array,
    weight: Array | None,
    lora_a: Array,
    lora_b: Array,
    scaling: float | Array,
    indptr: Array | None = None,
    adapter_ids: Array | None = None,
) -> tuple[A, A, A]:
    """Gradients of `lora_forward`. With u = x A^T and du = grad_y B:

        grad_x = grad_y W + scaling * du A,  grad_a = scaling * du^T x,  grad_b = scaling * grad_y^T u

    grad_y: [num_tokens, out_features] float
    x, weight, lora_a, lora_b, scaling, indptr, adapter_ids: as in `lora_forward`
    returns: grad_x [num_tokens, in_features], grad_a like lora_a, grad_b like lora_b, all float32

    The weight is frozen and gets no gradient. An adapter without rows gets zeros.
    """
    grad_x = empty(grad_y, dim(x, 0), dim(x, 1), dtype="float32")
    grad_a = zeros(grad_y, *shape_of(lora_a), dtype="float32")
    grad_b = zeros(grad_y, *shape_of(lora_b), dtype="float32")
    _ops.lora_backward(grad_y, x, weight, lora_a, lora_b, scaling, indptr, adapter_ids, grad_x, grad_a, grad_b)
    return cast(A, give(grad_y, grad_x)), cast(A, give(grad_y, grad_a)), cast(A, give(grad_y, grad_b))
