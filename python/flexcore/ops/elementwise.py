"""Norms, rotary embedding, the gated activation."""

from __future__ import annotations

from typing import cast

from flexcore import _ops
from flexcore.ops._arrays import A, Array, empty, give, shape_of


def rms_norm(x: A, weight: Array, eps: float = 1e-5) -> A:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    x: [rows, width] float; heads are normalised as [num_tokens * num_heads, head_dim]
    weight: [width] float32, contiguous
    returns: [rows, width], dtype of x
    """
    y = empty(x, *shape_of(x))
    _ops.rms_norm(x, weight, eps, y)
    return cast(A, give(x, y))


def rms_norm_backward(grad_y: A, x: Array, weight: Array, eps: float = 1e-5) -> A:
    """Gradient of `rms_norm` with respect to x; the weight is frozen.

    grad_y: [rows, width] float; x, weight and eps as in `rms_norm`
    returns: [rows, width], dtype of grad_y
    """
    grad_x = empty(grad_y, *shape_of(x))
    _ops.rms_norm_backward(grad_y, x, weight, eps, grad_x)
    return cast(A, give(grad_y, grad_x))


def rotary(x: A, positions: Array, cos: Array, sin: Array, inverse: bool = False) -> A:
    """Rotary position embedding over the pairs (i, i + head_dim / 2), as in Llama's Hugging Face weights.

    x: [num_tokens, num_heads, head_dim] float, head_dim even
    positions: [num_tokens] int32 in [0, max_positions), contiguous
    cos, sin: [max_positions, head_dim / 2] float32, contiguous
    inverse: turn back by the same angle; that is also the gradient
    returns: like x

    Su et al. 2021 (arXiv 2104.09864), section 3.2.
    """
    y = empty(x, *shape_of(x))
    _ops.rotary(x, positions, cos, sin, inverse, y)
    return cast(A, give(x, y))


def silu_mul(gate: A, up: Array) -> A:
    """silu(gate) * up (SwiGLU: Shazeer 2020, arXiv 2002.05202, section 2).

    gate, up: [num_tokens, intermediate_size] float, of one dtype
    returns: like gate
    """
    y = empty(gate, *shape_of(gate))
    _ops.silu_mul(gate, up, y)
    return cast(A, give(gate, y))


def silu_mul_backward(grad_y: A, gate: Array, up: Array) -> tuple[A, A]:
    """Gradients of `silu_mul`: (grad_gate, grad_up), like grad_y.

    grad_y: [num_tokens, intermediate_size] float; gate and up as in `silu_mul`
    """
    grad_gate, grad_up = empty(grad_y, *shape_of(gate)), empty(grad_y, *shape_of(gate))
    _ops.silu_mul_backward(grad_y, gate, up, grad_gate, grad_up)
    return cast(A, give(grad_y, grad_gate)), cast(A, give(grad_y, grad_up))
