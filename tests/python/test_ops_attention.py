"""fc.ops attention over pages, and its backward in windows, against plain attention and autograd in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest

import flexcore as fc

torch = pytest.importorskip("torch")

HEADS, KV_HEADS, DIM, BLOCK, SCALE = 6, 2, 16, 4, 0.3


def attend(q: Any, k: Any, v: Any, sliding_window: int = 0) -> tuple[Any, Any]:
    """q [tokens, HEADS, DIM] is the end of the sequence k, v [length, KV_HEADS, DIM]. Returns y and log-sum-exp."""
    tokens, length = q.shape[0], k.shape[0]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    rows, columns = torch.arange(length - tokens, length)[:, None], torch.arange(length)[None]
    seen = columns <= rows
    if sliding_window:
        seen &= columns > rows - sliding_window
    scores = (torch.einsum("thd,lhd->htl", q, k) * SCALE).masked_fill(~seen, -torch.inf)
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), v), scores.logsumexp(-1).T


class Pages:
    """Sequences of the given lengths in shuffled pages, written through kv_write; unused slots are NaN."""

    def __init__(self, lengths: list[int], dtype: Any = torch.float32) -> None:
        blocks = [(length + BLOCK - 1) // BLOCK for length in lengths]
        order = torch.randperm(sum(blocks) + 3, dtype=torch.int32)
        self.tables = torch.full((len(lengths), max([*blocks, 1])), -7, dtype=torch.int32)
        for i, count in enumerate(blocks):
            self.tables[i, :count], order = order[:count], order[count:]
        shape = (sum(blocks) + 3, KV_HEADS, BLOCK, DIM)
        self.k_pages, self.v_pages = (
            torch.full(shape, torch.nan, dtype=dtype),
            torch.full(shape, torch.nan, dtype=dtype),
        )
        self.k = [torch.randn(length, KV_HEADS, DIM).to(dtype) for length in lengths]
        self.v = [torch.randn(length, KV_HEADS, DIM).to(dtype) for length in lengths]
        indptr = torch.tensor([0, *lengths]).cumsum(0).int()
        positions = torch.zeros(len(lengths), dtype=torch.int32)
        fc.ops.kv_write(
            torch.cat(self.k), torch.cat(self.v), self.k_pages, self.v_pages, self.tables, indptr, positions
        )


def close(got: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).norm().item()
    assert error <= tolerance * (1e-6 + wanted.double().norm().item()), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sliding_window", [0, 5])
def test_a_ragged_batch(dtype: Any, sliding_window: int) -> None:
    torch.manual_seed(1)
    lengths, tokens = [23, 1, 9, 40], [5, 1, 0, 40]
    pages = Pages(lengths, dtype)
    q = torch.randn(sum(tokens), HEADS, DIM).to(dtype)
    indptr = torch.tensor([0, *tokens]).cumsum(0).int()
    positions = torch.tensor([length - count for length, count in zip(lengths, tokens, strict=True)], dtype=torch.int32)
    y, lse = fc.ops.attention(q, pages.k_pages, pages.v_pages, pages.tables, indptr, positions, SCALE, sliding_window)
    assert y.dtype == dtype and lse.dtype == torch.float32
    for i, (rows, k, v) in enumerate(zip(q.split(tokens), pages.k, pages.v, strict=True)):
        wanted_y, wanted_lse = attend(rows.double(), k.double(), v.double(), sliding_window)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        close(y[indptr[i] : indptr[i + 1]], wanted_y, tolerance)
        close(lse[indptr[i] : indptr[i + 1]], wanted_lse, tolerance)


def split(length: int, rng: random.Random) -> list[tuple[int, int]]:
    cuts = sorted(rng.sample(range(1, length), rng.randint(0, length - 1)))
    return list(zip([0, *cuts], [*cuts, length], strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_windows_of_any_cut_give_the_gradient(seed: int) -> None:
    rng, length = random.Random(seed), random.Random(seed).randint(1, 30)
    sliding_window = rng.choice([0, 0, 3, 11])
    torch.manual_seed(seed)
    pages = Pages([length])
    q, grad_y = torch.randn(2, length, HEADS, DIM)
    y, lse = torch.empty_like(q), torch.empty(length, HEADS)
    for a, b in split(length, rng):
        y[a:b], lse[a:b] = fc.ops.attention(
            q[a:b], pages.k_pages, pages.v_pages, pages.tables, torch.tensor([0, b - a], dtype=torch.int32),
            torch.tensor([a], dtype=torch.int32), SCALE, sliding_window,
        )  # fmt: skip

    leaves = [x.double().requires_grad_() for x in (q, pages.k[0], pages.v[0])]
    wanted = torch.autograd.grad(attend(*leaves, sliding_window)[0], leaves, grad_y.double())

    sums = torch.zeros(2, length, KV_HEADS, DIM)
    got = [torch.empty_like(q), *torch.full_like(sums, torch.nan)]
    for a, b in reversed(split(length, rng)):
        rows = fc.ops.attention_backward_window(
            grad_y[a:b], q[a:b], y[a:b], lse[a:b], pages.k_pages, pages.v_pages, pages.tables[0], a, sums[0], sums[1],
            SCALE, sliding_window,
        )  # fmt: skip
        for whole, part in zip(got, rows, strict=True):
            whole[a:b] = part
    for mine, judge in zip(got, wanted, strict=True):
        close(mine, judge)
    assert torch.equal(sums[0], got[1]) and torch.equal(sums[1], got[2])  # each window's own rows were final


def test_errors_name_the_argument() -> None:
    pages = Pages([10])
    q, one, zero = torch.randn(10, HEADS, DIM), torch.tensor([0, 10], dtype=torch.int32), torch.zeros(1).int()
    good = {
        "q": q, "k_pages": pages.k_pages, "v_pages": pages.v_pages, "block_tables": pages.tables, "indptr": one,
        "positions": zero, "scale": SCALE,
    }  # fmt: skip
    fc.ops.attention(**good)
    bad: dict[str, list[Any]] = {
        "q": [q[0], q[:, :5], q[..., :8], q.double()],
        "k_pages": [pages.k_pages[0], pages.k_pages[:, :, ::2], pages.k_pages.int()],
        "v_pages": [pages.v_pages[1:], pages.v_pages.bfloat16()],
        "block_tables": [pages.tables[0], pages.tables.long(), pages.tables[:0]],
        "indptr": [one[:1], one + 1, torch.tensor([0, 12, 10]).int(), one.long(), one.float(), one[:0]],
        "positions": [zero.long(), one],
        "scale": ["x", None],
        "sliding_window": [-1, 1.5],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(fc.InvalidArgument, match=rf"attention: .*({name}|query heads|head_dim)"):
                fc.ops.attention(**{**good, name: value})
    for position in (-1, 3, 2**31 - 1):  # before the sequence; past the table's last page
        with pytest.raises(fc.InvalidArgument, match=r"attention: .*position"):
            fc.ops.attention(**{**good, "positions": zero + position})
    with pytest.raises(fc.InvalidArgument, match="page 1000 in a block table"):
        fc.ops.attention(**{**good, "block_tables": torch.full_like(pages.tables, 1000)})

    y, lse = fc.ops.attention(**good)
    sums = torch.zeros(2, 10, KV_HEADS, DIM)
    window = [q, q, y, lse, pages.k_pages, pages.v_pages, pages.tables[0], 0, sums[0], sums[1], SCALE]
    fc.ops.attention_backward_window(*window)
    wrong = {0: q[:, 0], 3: lse[:, :1], 6: pages.tables, 7: 2**62, 8: sums[0, :9], 9: sums[1].bfloat16()}
    for index, value in wrong.items():
        with pytest.raises(fc.InvalidArgument, match="attention_backward"):
            fc.ops.attention_backward_window(*window[:index], value, *window[index + 1 :])
