"""fc.ops computes what torch computes: float32 and bfloat16, numpy and torch, autograd as the judge of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flexcore as fc

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Rounding of one result, with room for sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(shape).to(dtype)


def close(got: Any, wanted: Any, dtype: Any = torch.float32) -> None:
    """Norm-wise, as DESIGN.md has it for gradients; a NaN anywhere fails."""
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm().item()
    assert error <= TOLERANCE[dtype] * (1e-6 + wanted.double().norm().item()), error


def gradients(f: Callable[..., Any], grad_y: Any, *inputs: Any) -> list[Any]:
    """autograd in float64."""
    leaves = [x.double().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(f(*leaves), leaves, grad_y.double(), allow_unused=True))


@DTYPES
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 1, 1), (5, 33, 17), (70, 96, 130), (0, 8, 4)])
def test_linear(dtype: Any, rows: int, inner: int, out: int) -> None:
    x, weight, bias = randn(rows, inner, dtype=dtype), randn(out, inner, dtype=dtype), randn(out)
    y = fc.ops.linear(x, weight, bias)
    assert y.dtype == dtype
    close(y, F.linear(x.double(), weight.double(), bias.double()), dtype)
    close(fc.ops.linear(x, weight), F.linear(x.double(), weight.double()), dtype)
    grad_y = randn(rows, out, dtype=dtype)
    grad_x = fc.ops.linear_backward(grad_y, weight)
    assert grad_x.dtype == torch.float32
    close(grad_x, grad_y.double() @ weight.double(), dtype)


@pytest.mark.parametrize("stride", [20, -20, 0])
def test_rows_with_gaps_backwards_and_repeated(stride: int) -> None:
    block = np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32)
    x = {20: block[:, :13], -20: block[::-1, :13], 0: np.broadcast_to(block[0, :13], (6, 13))}[stride]
    assert x.strides[0] == 4 * stride
    weight = block[:4, :13].copy()
    np.testing.assert_allclose(fc.ops.linear(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fc.ops.silu_mul(x, x), x * x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)


def lora_reference(x: Any, weight: Any, a: Any, b: Any, scaling: list[float], indptr: list[int], ids: list[int]) -> Any:
    rows = []
    for begin, end, adapter in zip(indptr[:-1], indptr[1:], ids, strict=True):
        y = x[begin:end] @ weight.T
        if adapter >= 0:
            y = y + scaling[adapter] * (x[begin:end] @ a[adapter].T) @ b[adapter].T
        rows.append(y)
    return torch.cat(rows)


@DTYPES
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("rank", [1, 8, 21])
def test_ragged_adapters(dtype: Any, with_weight: bool, rank: int) -> None:
    # An adapter twice, one never, rows without, an empty segment, a segment of one row.
    indptr, ids, scaling = [0, 9, 9, 30, 31, 37, 50], [2, 0, -1, 1, 2, 0], [0.5, 2.0, -1.5, 3.0]
    inner, out = 40, 56
    x, weight = randn(50, inner, dtype=dtype), randn(out, inner, dtype=dtype) * (0.2 if with_weight else 0)
    a, b, grad_y = randn(4, rank, inner) * 0.2, randn(4, out, rank) * 0.2, randn(50, out, dtype=dtype)
    plain = weight if with_weight else None
    batch = {
        "scaling": torch.tensor(scaling),
        "indptr": torch.tensor(indptr, dtype=torch.int32),
        "adapter_ids": torch.tensor(ids, dtype=torch.int32),
    }

    def forward(x: Any, a: Any, b: Any) -> Any:
        return lora_reference(x, weight.double(), a, b, scaling, indptr, ids)

    y = fc.ops.lora_forward(x, plain, a, b, **batch)
    assert y.dtype == dtype
    close(y, forward(x.double(), a.double(), b.double()), dtype)

    got = fc.ops.lora_backward(grad_y, x, plain, a, b, **batch)
    for mine, wanted in zip(got, gradients(forward, grad_y, x, a, b), strict=True):
        assert mine.dtype == torch.float32
        close(mine, wanted, dtype)
    assert not got[1][3].any() and not got[2][3].any()  # the adapter that no row used


def test_one_adapter_needs_no_segments() -> None:
    x, weight, a, b = randn(7, 24), randn(10, 24), randn(4, 24), randn(10, 4)
    y = fc.ops.lora_forward(x, weight, a, b, 0.5)
    close(y, x @ weight.T + 0.5 * (x @ a.T) @ b.T)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    mixed = fc.ops.lora_forward(x, weight, a, b, 0.5, offsets, torch.tensor([-1, 0], dtype=torch.int32))
    close(mixed[:3], x[:3] @ weight.T)
    assert torch.equal(mixed[3:], y[3:])  # a row does not feel the rest of its batch
    stacked = fc.ops.lora_forward(x, weight, torch.stack([a, 2 * a]), torch.stack([b, b]), 0.5, offsets)
    close(stacked[3:], x[3:] @ weight.T + (x[3:] @ a.T) @ b.T)  # segment i has adapter i


@DTYPES
def test_rms_norm(dtype: Any) -> None:
    x, weight, grad_y = randn(9, 72, dtype=dtype), randn(72), randn(9, 72, dtype=dtype)

    def norm(x: Any) -> Any:
        return F.rms_norm(x, (72,), weight.double(), 1e-3)

    close(fc.ops.rms_norm(x, weight, 1e-3), norm(x.double()), dtype)
    close(fc.ops.rms_norm_backward(grad_y, x, weight, 1e-3), gradients(norm, grad_y, x)[0], dtype)


@DTYPES
def test_rotary(dtype: Any) -> None:
    half = 12
    x, positions = randn(11, 3, 2 * half, dtype=dtype), torch.randint(0, 50, (11,), dtype=torch.int32)
    angles = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    y = fc.ops.rotary(x, positions, angles.cos(), angles.sin())
    cos, sin = angles.cos()[positions, None].double(), angles.sin()[positions, None].double()
    first, second = x.double()[..., :half], x.double()[..., half:]
    close(y, torch.cat([first * cos - second * sin, second * cos + first * sin], -1), dtype)
    close(fc.ops.rotary(y, positions, angles.cos(), angles.sin(), inverse=True), x, dtype)


@DTYPES
def test_silu_mul(dtype: Any) -> None:
    gate, up, grad_y = (randn(6, 50, dtype=dtype) for _ in range(3))

    def gated(gate: Any, up: Any) -> Any:
        return F.silu(gate) * up

    close(fc.ops.silu_mul(gate, up), gated(gate.double(), up.double()), dtype)
    for mine, wanted in zip(
        fc.ops.silu_mul_backward(grad_y, gate, up), gradients(gated, grad_y, gate, up), strict=True
    ):
        close(mine, wanted, dtype)


@DTYPES
@pytest.mark.parametrize("vocab", [5, 2500])
def test_linear_cross_entropy(dtype: Any, vocab: int) -> None:
    hidden, weight = randn(13, 36, dtype=dtype), randn(vocab, 36, dtype=dtype)
    labels, scale = torch.randint(0, vocab, (13,), dtype=torch.int32), torch.rand(13)

    def loss_of(hidden: Any) -> Any:
        return F.cross_entropy(hidden @ weight.double().T, labels.long(), reduction="none")

    loss, nothing = fc.ops.linear_cross_entropy(hidden, weight, labels)
    assert nothing is None
    close(loss, loss_of(hidden.double()), dtype)
    loss, grad_hidden = fc.ops.linear_cross_entropy(hidden, weight, labels, scale)
    close(loss, loss_of(hidden.double()), dtype)
    close(grad_hidden, gradients(loss_of, scale, hidden)[0], dtype)
    close(
        fc.ops.linear_cross_entropy(hidden, weight, labels, 0.25)[1],
        gradients(loss_of, scale * 0 + 0.25, hidden)[0],
        dtype,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_walks_with_torch(weight_decay: float) -> None:
    param = randn(3, 50)
    judge = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([judge], lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=weight_decay)
    moments = torch.zeros(2, 3, 50)
    for step in range(1, 6):
        grad = randn(3, 50)
        judge.grad = 0.5 * grad
        optimizer.step()
        fc.ops.adamw_(param, grad, moments[0], moments[1], step, learning_rate=3e-3, betas=(0.8, 0.99), eps=1e-6,
                      weight_decay=weight_decay, grad_scale=0.5)  # fmt: skip
    close(param, judge.detach())


def test_sample() -> None:
    logits = randn(400, 30)
    tokens, logprobs = fc.ops.sample(logits, temperature=0)
    assert torch.equal(tokens.long(), logits.argmax(-1)) and tokens.dtype == torch.int32
    close(logprobs, logits.log_softmax(-1).max(-1).values)

    same = logits[:1].expand(4000, 30).contiguous()
    tokens, logprobs = fc.ops.sample(same, temperature=0.7, seed=3)
    counts = torch.bincount(tokens.long(), minlength=30) / 4000
    assert (counts - (logits[0] / 0.7).softmax(-1)).abs().max() < 0.04
    close(logprobs, logits[0].log_softmax(-1)[tokens.long()])
    # A draw is a function of (seed, counter) and its row.
    assert torch.equal(fc.ops.sample(same[:7], temperature=0.7, seed=3, counter=100)[0], tokens[100:107])
    assert set(fc.ops.sample(same, top_k=2, seed=1)[0].tolist()) == set(logits[0].topk(2).indices.tolist())
    with pytest.raises(fc.Error, match="row 1"):
        fc.ops.sample(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]))
