"""How many kernels the CUDA launchers start, decided as csrc/backends/cuda decides it; GEMMs count as one.

tests/simt/launches.json holds counts of a tiny model: the engine's own in tests/simt/launches_test.cpp, and what this
module says of the same steps in tests/python/test_cuda_floors.py. Copies of tables to the device are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: rates of its memory and its arithmetic, and what launchers ask it for."""

    name: str = "NVIDIA H200"
    bytes_per_s: float = 4.3e12  # copied, read and written
    bfloat16_flops: float = 780e12
    float32_flops: float = 60e12
    multiprocessors: int = 132
    l2_bytes: int = 60 << 20


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence."""

    tokens: int
    position: int = 0

    @property
    def context(self) -> int:
        return self.position + self.tokens

    @property
    def pairs(self) -> int:
        """(Row, position) pairs that attention looks at."""
        return self.tokens * self.position + self.tokens * (self.tokens + 1) // 2


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


def compiled_head_dim(head_dim: int) -> int:
    return next(size for size in (64, 128, 256) if head_dim <= size)


def attention_forward_splits(card: Card, spans: Sequence[Span], heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether keys are cut, so that attention_merge_kernel follows. ForwardShape; bfloat16."""
    size = compiled_head_dim(head_dim)
    tile = 128 if size <= 128 else 64
    options = [16, 32, 64] + [tile] * (tile > 64)
    slots = card.multiprocessors * (2 if size <= 64 else 1)
    return _splits_keys(spans, heads // kv_heads, kv_heads, options, tile, slots)


def attention_backward_splits(card: Card, spans: Sequence[Span], heads: int, kv_heads: int, head_dim: int) -> bool:
    """The same of grad_q. GradQShape; bfloat16."""
    tile = 64 if compiled_head_dim(head_dim) <= 128 else 32
    options, slots = [16, 32] + [tile] * (tile > 32), 2 * card.multiprocessors
    return _splits_keys(spans, heads // kv_heads, kv_heads, options, tile, slots)


def _splits_keys(
    spans: Sequence[Span], group: int, kv_heads: int, options: Sequence[int], key_tile: int, slots: int
) -> bool:
    """attention_tables.cu, cut_rows."""

    def key_tiles(tile_rows: int) -> list[int]:
        found = []
        for span in spans:
            rows = span.tokens * group
            for begin in range(0, rows, tile_rows):
                last = min(begin + tile_rows, rows) - 1
                found.append(divide_up(span.position + last // group + 1, key_tile))
        return found

    option = len(options) - 1
    tiles = key_tiles(options[option])
    while option > 0 and sum(tiles) * kv_heads < slots:
        option -= 1
        tiles = key_tiles(options[option])
    share = max(2, divide_up(sum(tiles) * kv_heads, slots))
    return any(4 * count > 5 * share for count in tiles)


@dataclass(frozen=True)
class Lora:
    """The bypasses of linears with one input: `segments` are the rows of each adapter in the batch."""

    rank: int
    segments: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.segments)


def lora_forward_launches(lora: Lora) -> int:
    """Shrink and expand."""
    return 2 if lora.rows > 0 else 0


def lora_backward_launches(
    card: Card, lora: Lora, inputs: int, outputs: Sequence[int], one_dtype: bool, input_grad: bool
) -> int:
    """lora_plan.cu. `one_dtype`: x and the gradients of y share a dtype, and so a launch for grad A and grad B."""
    stride, many = (lora.rank + 3) // 4 * 4, card.multiprocessors
    segments = [rows for rows in lora.segments if rows > 0]
    stacked = divide_up(len(outputs) * stride, 64)
    slabs = any(width >= 2 * 1024 for width in (inputs, *outputs))  # kSplitFeatures
    row_tiles = lora.rows * divide_up(inputs, 128) * stacked
    row_tiles += sum(lora.rows * divide_up(width, 128) * divide_up(stride, 64) for width in outputs)
    chunk = max(128, divide_up(row_tiles, 3 * many))
    chunks = max(divide_up(rows, divide_up(divide_up(rows, divide_up(rows, chunk)), 64) * 64) for rows in segments)
    passes = divide_up(divide_up(len(outputs) * stride, 32), 16) if input_grad else 0
    return 2 + slabs + (1 if one_dtype else 2) + (chunks > 1) + passes


def cross_entropy_launches(card: Card, rows: int, vocab_size: int) -> tuple[int, int]:
    """(GEMMs, other kernels) of a loss with gradient. cross_entropy.cu, cut; bfloat16 weights."""
    fit = card.l2_bytes // (4 + 2)
    block = min(rows, max(128, fit // 1024))
    chunk = min(vocab_size, max(1024, fit // block // 256 * 256))
    parts = min(divide_up(2 * card.multiprocessors, block), divide_up(chunk, 1024))
    blocks, chunks = divide_up(rows, block), divide_up(vocab_size, chunk)
    return 2 * blocks * chunks, blocks * (chunks * (2 if parts > 1 else 1) + 1)
