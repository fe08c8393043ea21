"""What the drivers of the systems share: the workload, the clock, memory, and how results leave the process."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workload:
    """One for all systems."""

    prompt: int = 36  # tokens before the decode that is measured
    decode: int = 64  # tokens that are measured
    batch: int = 16
    prefill: int = 1024
    train: int = 512  # tokens of a training sequence; one sequence an optimizer step
    rank: int = 16
    alpha: int = 32
    repeats: int = 3  # of what is short enough
    seconds: float = 8.0  # after these, no further repeat

    @staticmethod
    def quick() -> Workload:
        return Workload(decode=8, prefill=128, train=64, repeats=1, seconds=1.0)


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that all runs")
    parser.add_argument("--what", default="speed", choices=["speed", "coserve"])
    return parser.parse_args()


def workload(args: argparse.Namespace) -> Workload:
    return Workload.quick() if args.quick else Workload()


def ids(count: int, vocab_size: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(10, vocab_size) for _ in range(count)]


def median_seconds(work: Callable[[], float | None], load: Workload) -> float:
    """Of some runs after a first one, which counts only if it was so long that there is no time for a second. `work`
    may return the seconds that it means."""
    spans: list[float] = []
    begin = time.perf_counter()
    while len(spans) <= load.repeats:
        start = time.perf_counter()
        meant = work()
        spans.append(time.perf_counter() - start if meant is None else meant)
        if time.perf_counter() - begin > load.seconds:
            break
    return statistics.median(spans[1:] or spans)


class Memory:
    """Resident bytes of this process, from the kernel: the same ruler for every system."""

    def __init__(self) -> None:
        self.before = self._read("VmRSS")

    def start_peak(self) -> None:
        """After loading: what loading alone needed is given back and forgotten."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak_above(self, weights: int) -> int:
        """Peak since start_peak, without what the process had before it loaded the model and without the weights."""
        return self._read("VmHWM") - self.before - weights

    def now_above(self, weights: int) -> int:
        return self._read("VmRSS") - self.before - weights

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
        raise RuntimeError(f"/proc/self/status has no {name}")


def finish(versions: dict[str, str], results: dict[str, object], load: Workload) -> None:
    """The result is the last line of standard output."""
    print(json.dumps({"versions": versions, "workload": asdict(load), "results": results}))
    os._exit(0)  # some runtimes take seconds, or fall over, on the way out
