"""Every op at the shapes of real models beside its floor (flexcore_bench); without that program, whole engine steps.

`--plan` runs nothing: it says what the CUDA kernels of a step would cost at least.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

import flexcore
from flexcore.bench import _measure, _plan
from flexcore.bench._floors import ModelWork, Peaks, Work, find_binary, measure_peaks
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--binary", metavar="FILE", help="flexcore_bench (default: on the PATH, or from `make bench`)")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--quick", action="store_true", help="see that all runs; the times mean little")
    _plan.add_arguments(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    if args.plan:
        return _plan.run(args)
    binary = find_binary(args.binary)
    if args.binary and binary is None:
        raise flexcore.InvalidArgument(f"--binary: {args.binary} is no program")
    if binary:
        return _run_binary(binary, args)
    if err.is_terminal:
        err.print("flexcore_bench is not here (`make bench` builds it); timing whole engine steps", style="dim")
    result = _engine_steps(args)
    write_json(args.json, result)
    if args.json != "-":
        out.print(_table(result["kernels"]))
    return 0


def _run_binary(binary: Path, args: argparse.Namespace) -> int:
    command = [str(binary), "--device", args.device, "--filter", args.filter, "--threads", str(args.num_threads)]
    command += ["--quick"] if args.quick else []
    if args.json == "-":
        return subprocess.run([*command, "--json", "-"], check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.json"
        code = subprocess.run([*command, "--json", str(file)], check=False).returncode
        if code == 0:
            write_json(args.json, json.loads(file.read_text()))
    return code


def _engine_steps(args: argparse.Namespace) -> dict[str, Any]:
    engine = _measure.load_engine(args)
    model = engine.model()
    work = ModelWork(model, 4 if model.dtype == "float32" else 2)
    peaks = measure_peaks(model.num_threads)
    repeats = 1 if args.quick else 5
    longest = min(model.max_model_len - 1, 512)
    rows = []
    for batch in (1, 16):
        tokens = min(33, longest)
        seconds = [_decode_seconds(engine, batch, tokens, turn) for turn in range(repeats)]
        rows.append(_row(f"decode/batch:{batch}", seconds, work.decode(batch, tokens), peaks, model.dtype))
    for length in sorted({min(128, longest), longest}):
        seconds = [_prefill_seconds(engine, length, turn) for turn in range(repeats)]
        rows.append(_row(f"prefill/tokens:{length}", seconds, work.prefill(length), peaks, model.dtype))
    seconds = _finetune_seconds(engine, longest, repeats)
    rows.append(_row(f"finetune/tokens:{longest}", seconds, work.finetune(longest), peaks, model.dtype))
    rows = [row for row in rows if not args.filter or args.filter in row["name"]]
    return {"machine": _measure.machine(engine), "peaks": vars(peaks), "kernels": rows}


def _row(name: str, seconds: list[float], work: Work, peaks: Peaks, dtype: str) -> dict[str, Any]:
    median = _measure.spread(seconds)["median"]
    floor = work.floor(peaks, dtype)
    return {
        "name": name,
        "median_us": 1e6 * median,
        "fastest_us": 1e6 * min(seconds),
        "slowest_us": 1e6 * max(seconds),
        "bytes_read": work.bytes,
        "flops": work.flops,
        "floor_us": 1e6 * floor,
        "fraction_of_floor": floor / median,
    }


def _decode_seconds(engine: flexcore.Engine, batch: int, tokens: int, turn: int) -> float:
    """Of one step in which every sequence gets a token."""
    vocab = engine.model().vocab_size
    engine.submit_batch([[5 + turn, 7 + k % vocab] for k in range(batch)], _measure.greedy(tokens))
    steps = []
    while engine.has_work():
        start = time.perf_counter()
        report = engine.step()
        if report.num_decode_tokens == batch and not report.num_prefill_tokens:
            steps.append(time.perf_counter() - start)
    return _measure.spread(steps)["median"]


def _prefill_seconds(engine: flexcore.Engine, length: int, turn: int) -> float:
    engine.submit(_measure.random_ids(length, engine.model().vocab_size, turn), _measure.greedy(1))
    start = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - start


def _finetune_seconds(engine: flexcore.Engine, length: int, steps: int) -> list[float]:
    """Of each optimizer step on one sequence; the first warms up."""
    engine.create_adapter("bench", flexcore.LoraConfig(r=16, lora_alpha=32))
    rows = [_measure.random_ids(length, engine.model().vocab_size, k) for k in range(steps + 1)]
    engine.finetune("bench", [flexcore.Example(ids, ids) for ids in rows], flexcore.FinetuneConfig(batch_size=1))
    ends: list[float] = []
    while engine.has_work():
        ends += [time.perf_counter() for event in engine.step().finetune if event.step > len(ends)]
    engine.unload_adapter("bench")
    return [after - before for before, after in itertools.pairwise(ends)]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("step", "median ms", "floor ms", "of it")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        share = f"{row['fraction_of_floor']:.0%}"
        table.add_row(row["name"], f"{row['median_us'] / 1000:.2f}", f"{row['floor_us'] / 1000:.2f}", share)
    return table
