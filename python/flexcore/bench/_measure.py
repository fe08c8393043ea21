"""What the benchmarks share: the machine's name, random prompts, medians with their spread."""

from __future__ import annotations

import argparse
import os
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flexcore
from flexcore.cli import options
from flexcore.cli.console import bytes_progress
from flexcore.datasets.reader import read_rows
from flexcore.ui import percentile


def load_engine(args: argparse.Namespace) -> flexcore.Engine:
    """The engine that the arguments describe; a tokenizer is not needed. The same prompt again costs the same again."""
    config = options.engine_config(args)
    config.enable_prefix_caching = False
    with bytes_progress("converting") as progress:
        return flexcore.Engine(options.model_of(args), config, progress)


def machine(engine: flexcore.Engine) -> dict[str, Any]:
    model = engine.model()
    return {
        "flexcore": flexcore.__version__,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": model.num_threads,
        "device": model.device,
        "dtype": model.dtype,
        "model": engine.model_directory.name,
        "parameters": model.num_parameters,
    }


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(min(10, vocab_size - 1), vocab_size) for _ in range(count)]


def read_prompts(path: Path) -> list[str]:
    """Of JSON lines with prompt, text or turns."""
    rows = [row.value for row in read_rows(path)]
    found = [row.get("prompt") or row.get("text") or (row.get("turns") or [""])[0] for row in rows]
    texts = [text for text in found if text]
    if not texts:
        raise flexcore.InvalidArgument(f"--prompts: {path} has no row with prompt, text or turns")
    return texts


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": percentile(values, 50),
        "p10": percentile(values, 10),
        "p90": percentile(values, 90),
        "runs": float(len(values)),
    }


def greedy(tokens: int) -> flexcore.SamplingParams:
    return flexcore.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def trained_tokens(engine: flexcore.Engine) -> float:
    """Since load. A token is trained when it went forth and back through all layers; each half counts half."""
    stats = engine.stats()
    forward = stats.get("finetune_forward_tokens", 0.0)
    return (forward + stats.get("backward_layer_tokens", 0.0) / engine.model().num_layers) / 2


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
