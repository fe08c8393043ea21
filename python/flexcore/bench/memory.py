"""Memory of finetuning: what each stage of the compiler saves, and activations against speed beyond that."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

import flexcore
from flexcore.adapters import AdapterConfig
from flexcore.bench import _measure
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.ui import format_bytes

# What is left out, one after the other: finetune_activations, and whether a window is the whole sequence.
STAGES = (
    ("no optimisation", "all", True),
    ("graph pruning", "read", True),
    ("rematerialization", "exact", True),
    ("token-level", "exact", False),
    ("8-bit groups", "int8", False),
)
_OF_A_SEQUENCE = ("saved_activations", "gradients", "workspace")  # beside weights, pages, adapter and optimizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--sequence-length", type=options.positive, default=512, metavar="TOKENS")
    parser.add_argument("--points", type=options.positive, default=8, metavar="N", help="from all kept to the least")
    parser.add_argument(
        "--window", type=options.positive, default=64, metavar="TOKENS", help="of the token-level stages"
    )
    parser.add_argument("--train-steps", type=options.positive, default=3, metavar="N", help="of a sequence each")
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    args.max_num_seqs = 2  # one training sequence at a time
    stages = [_stage(args, *stage) for stage in STAGES]
    errors = _gradient_errors(args)
    args.max_model_len = max(args.max_model_len, args.sequence_length)
    engine = _measure.load_engine(args)
    lora = options.adapter_of(args)
    plans = list(_choices(engine, args, lora))
    chosen = sorted({round(k * (len(plans) - 1) / max(1, args.points - 1)) for k in range(args.points)})
    # The least first: the ledger's peaks only grow. Each is timed again on the way back.
    rows = [_measured(engine, args, lora, *plans[index]) for index in reversed(chosen)][::-1]
    for row, index in zip(rows, chosen, strict=True):
        row["step_seconds"] += _step_seconds(engine, args, lora, plans[index][0])
    for row in rows:
        row["tokens_per_s"] = args.sequence_length / statistics.median(row["step_seconds"])
    unpruned = plans[0][1].unpruned_bytes_per_token_per_layer * engine.model().num_layers * args.sequence_length
    result = {
        "machine": _measure.machine(engine),
        "sequence_length": args.sequence_length,
        "unpruned_bytes": unpruned,
        "stages": stages,
        "gradient_errors": errors,
        "choices": len(plans),
        "memory": rows,
    }
    write_json(args.json, result)
    if args.json != "-":
        out.print(_stage_table(stages))
        out.print(
            f"gradients, as a share of their norm: 8-bit groups are off by {errors['int8']:.2%}, "
            f"{args.dtype} by {errors['dtype']:.2%} of float32's"
        )
        out.print(_table(result))
    return 0


def _stage(args: argparse.Namespace, name: str, activations: str, whole: bool) -> dict[str, Any]:
    """An engine of its own that takes a step: what it was to take, and what its ledger saw."""
    args = copy.copy(args)
    args.max_model_len = max(args.max_model_len, args.sequence_length)
    args.finetune_activations = activations
    args.max_num_batched_tokens = args.sequence_length if whole else min(args.window, args.sequence_length)
    engine = _measure.load_engine(args)
    config = options.engine_config(args)
    config.device = engine.model().device
    lora = options.adapter_of(args)
    plan = flexcore.plan(engine.model_directory, config, lora, args.sequence_length)
    vocab = engine.model().vocab_size
    ids = [_measure.random_ids(args.sequence_length, vocab, k) for k in range(2)]
    engine.create_adapter("bench", lora)
    job = engine.finetune("bench", [flexcore.Example(row, row) for row in ids], flexcore.FinetuneConfig(batch_size=1))
    while engine.has_work():
        engine.step()
    if engine.job(job).status != "succeeded":
        raise flexcore.Error(f"the job ended as {engine.job(job).status}: {engine.job(job).error}")
    peak = engine.memory_peak()
    return {
        "stage": name,
        "finetune_activations": activations,
        "window_tokens": args.max_num_batched_tokens,
        "planned": {tag: getattr(plan, tag) for tag in _OF_A_SEQUENCE},
        "measured": {tag: peak[tag] for tag in _OF_A_SEQUENCE},
    }


def _gradient_errors(args: argparse.Namespace) -> dict[str, float]:
    """Of a sequence and an adapter after a step: of 8-bit groups beside exact activations, of dtype beside float32."""
    args = copy.copy(args)
    args.max_model_len = max(args.max_model_len, args.sequence_length)
    adapter = options.adapter_of(args)
    gradients: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for dtype, kept in (("float32", "exact"), (args.dtype, "exact"), (args.dtype, "int8")):
            args.dtype, args.finetune_activations = dtype, kept
            engine = _measure.load_engine(args)
            row = _measure.random_ids(args.sequence_length, engine.model().vocab_size, 9)
            example = flexcore.Example(row, row)
            if not gradients:
                engine.create_adapter("bench", adapter)
                engine.finetune("bench", [example], flexcore.FinetuneConfig(batch_size=1, learning_rate=1e-3))
                while engine.has_work():
                    engine.step()
                engine.save_adapter("bench", directory)
                engine.unload_adapter("bench")
            engine.load_adapter("bench", directory)
            gradients[dtype, kept] = engine.loss_and_gradients("bench", [example])

    def error(got: dict[str, Any], wanted: dict[str, Any]) -> float:
        names = [name for name in wanted if name != "loss"]
        difference = sum(float(((got[name] - wanted[name]) ** 2).sum()) for name in names)
        return math.sqrt(difference / sum(float((wanted[name] ** 2).sum()) for name in names))

    exact = gradients[dtype, "exact"]
    return {"int8": error(gradients[dtype, "int8"], exact), "dtype": error(exact, gradients["float32", "exact"])}


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = Table("stage", "saved activations", "gradients", "workspace", "together", "of the first", "planned")
    for column in table.columns[1:]:
        column.justify = "right"
    first = sum(stages[0]["measured"].values())
    for stage in stages:
        total = sum(stage["measured"].values())
        table.add_row(
            stage["stage"],
            *(format_bytes(stage["measured"][tag]) for tag in _OF_A_SEQUENCE),
            format_bytes(total),
            f"{total / first:.1%}",
            format_bytes(sum(stage["planned"].values())),
        )
    return table


def _choices(
    engine: flexcore.Engine, args: argparse.Namespace, lora: AdapterConfig
) -> Iterator[tuple[int, flexcore.MemoryPlan]]:
    """Every amount that a sequence may keep, in bytes in flight, the most first, and its plan."""
    config = copy.copy(options.engine_config(args))
    config.device = engine.model().device
    while True:
        try:
            plan = flexcore.plan(engine.model_directory, config, lora, args.sequence_length)
        except flexcore.InvalidArgument:
            return
        bound = plan.saved_activations + plan.gradients - plan.optimizer // 2  # gradients of the adapter are not in it
        yield bound, plan
        config.finetune_memory_bytes = bound - 1


def _measured(
    engine: flexcore.Engine, args: argparse.Namespace, lora: AdapterConfig, bound: int, plan: flexcore.MemoryPlan
) -> dict[str, Any]:
    seconds = _step_seconds(engine, args, lora, bound)
    return {
        "finetune_memory_bytes": bound,
        "planned_bytes": plan.saved_activations,
        "measured_bytes": engine.memory_peak()["saved_activations"],
        "planned_host_bytes": plan.offloaded_activations,
        **{
            choice: sorted(tensor.name for tensor in plan.tensors if tensor.choice == choice)
            for choice in ("kept", "offloaded", "recomputed")
        },
        "step_seconds": seconds,
    }


def _step_seconds(engine: flexcore.Engine, args: argparse.Namespace, lora: AdapterConfig, bound: int) -> list[float]:
    """Of optimizer steps on one sequence each; a first one is not counted."""
    if err.is_terminal:
        err.print(f"{format_bytes(bound)} ...", style="dim")
    engine.set_finetune_memory(bound)
    engine.create_adapter("bench", lora)
    vocab = engine.model().vocab_size
    ids = [_measure.random_ids(args.sequence_length, vocab, k) for k in range(args.train_steps + 1)]
    examples = [flexcore.Example(row, row) for row in ids]
    job = engine.finetune("bench", examples, flexcore.FinetuneConfig(batch_size=1))
    ends: list[float] = []
    while engine.has_work():
        report = engine.step()
        ends += [time.perf_counter() for event in report.finetune if event.target_tokens]
    if engine.job(job).status != "succeeded":
        raise flexcore.Error(f"the job ended as {engine.job(job).status}: {engine.job(job).error}")
    engine.unload_adapter("bench")
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def _table(result: dict[str, Any]) -> Table:
    first = result["memory"][0]
    host = any(row["planned_host_bytes"] for row in result["memory"])
    names = ["kept", "of all", "planned", *["in host memory"] * host, "tok/s", "of the speed"]
    table = Table(*names, "made again in the upper layers")
    for column in table.columns[:-1]:
        column.justify = "right"
    for row in result["memory"]:
        table.add_row(
            format_bytes(row["measured_bytes"]),
            f"{row['measured_bytes'] / result['unpruned_bytes']:.1%}",
            format_bytes(row["planned_bytes"]),
            *[format_bytes(row["planned_host_bytes"])] * host,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / first['tokens_per_s']:.0%}",
            ", ".join(row["recomputed"]) or "-",
        )
    return table
