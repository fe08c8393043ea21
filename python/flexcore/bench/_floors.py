"""What a machine can do at best, and the least work of a step: together, the time that nobody can be faster than."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexcore import ModelInfo

_BUILT = Path("build/bench/bench/flexcore_bench")  # where `make bench` leaves it


@dataclass(frozen=True)
class Peaks:
    """Measured with the threads of the benchmark. The fields of flexcore_bench --probe."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    float32_flops: float
    bfloat16_flops: float
    source: str

    def best_of(self, other: Peaks) -> Peaks:
        """A probe that was disturbed says too little, never too much."""
        names = ("read_bytes_per_s", "copy_bytes_per_s", "float32_flops", "bfloat16_flops")
        return Peaks(**{name: max(getattr(self, name), getattr(other, name)) for name in names}, source=self.source)


@dataclass(frozen=True)
class Work:
    bytes: float  # read from memory
    flops: float

    def floor(self, peaks: Peaks, dtype: str = "bfloat16") -> float:
        """Seconds: memory and arithmetic at their peaks, one hidden behind the other."""
        rate = peaks.bfloat16_flops if dtype == "bfloat16" else peaks.float32_flops
        return max(self.bytes / peaks.read_bytes_per_s, self.flops / rate)


def find_binary(named: str | None = None) -> Path | None:
    """flexcore_bench: the one named, or that on the PATH, or where `make bench` builds it in the current directory."""
    for candidate in (named,) if named else (shutil.which("flexcore_bench"), _BUILT):
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate).resolve()
    return None


def measure_peaks(threads: int, binary: Path | None = None) -> Peaks:
    """By flexcore_bench --probe; without it by numpy, whose products and sums come close."""
    if binary:
        command = [str(binary), "--probe", "--threads", str(threads), "--json", "-"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return Peaks(**json.loads(done.stdout)["peaks"], source="flexcore_bench --probe")
    flops = _matmul_flops()
    read, copy = _bandwidths(threads)
    return Peaks(read, copy, flops, flops, "numpy")


def _fastest(work: Callable[[], object], repeats: int = 8) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul_flops(size: int = 1024) -> float:
    a = np.ones((size, size), np.float32)
    out = np.empty_like(a)
    return 2 * size**3 / _fastest(lambda: np.matmul(a, a, out=out))


def _bandwidths(threads: int, part: int = 64 << 20) -> tuple[float, float]:
    """Bytes per second read, and copied (read and written). numpy lets go of the GIL in both loops."""
    sources = [np.ones(part // 8, np.int64) for _ in range(threads)]
    targets = [np.ones(part // 8, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        read = _fastest(lambda: list(pool.map(np.bitwise_or.reduce, sources)))
        copy = _fastest(lambda: list(pool.map(np.copyto, targets, sources)))
    return threads * part / read, 2 * threads * part / copy


class ModelWork:
    """Bytes and FLOPs of steps of a decoder with `size` bytes a weight, fewer a quantised one; `rank` of LoRA on every
    linear."""

    def __init__(self, model: ModelInfo, size: int = 2, rank: int = 16) -> None:
        heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        hidden, wide = model.hidden_size, model.intermediate_size
        linears = [(heads, hidden), (kv, hidden), (kv, hidden), (hidden, heads)]
        linears += [(wide, hidden), (wide, hidden), (hidden, wide)]
        self.size = size
        codes = {"int8": 1.0, "int4": 0.5, "nf4": 0.5}.get(model.quantization)
        self._linear_size = size if codes is None else codes + 4 / model.quantization_group_size
        self.trunk = model.num_layers * sum(out * inputs for out, inputs in linears)
        self.head = model.vocab_size * hidden
        self.lora = model.num_layers * rank * sum(out + inputs for out, inputs in linears)
        self._kv_bytes = 2 * model.num_layers * kv * size  # of a token
        self._pair_flops = 2 * model.num_layers * heads  # of one product over a (row, position) pair

    @property
    def weight_bytes(self) -> float:
        return self._linear_size * self.trunk + self.size * self.head

    def decode(self, batch: int, context: float) -> Work:
        """One token for each of `batch` sequences that are `context` long."""
        pairs = batch * context
        return Work(
            self.weight_bytes + pairs * self._kv_bytes,
            2 * batch * (self.trunk + self.head) + 2 * pairs * self._pair_flops,
        )

    def prefill(self, tokens: int) -> Work:
        """A prompt, with logits of its last token."""
        flops = 2 * tokens * self.trunk + 2 * self.head + 2 * self._pairs(tokens) * self._pair_flops
        return Work(self.weight_bytes, flops)

    def finetune(self, tokens: int) -> Work:
        """Forth and back without recomputation: two products with each frozen weight, three with LoRA's, and seven of
        attention."""
        dense, lora = 4 * tokens * (self.trunk + self.head), 6 * tokens * self.lora
        return Work(2 * self.weight_bytes, dense + lora + 7 * self._pairs(tokens) * self._pair_flops)

    def finetune_state_bytes(self) -> int:
        """LoRA parameters, their gradients and AdamW's two moments, in float32."""
        return 4 * 4 * self.lora

    @staticmethod
    def _pairs(tokens: int) -> float:
        return tokens * (tokens + 1) / 2
