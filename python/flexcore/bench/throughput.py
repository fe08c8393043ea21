"""Tokens per second of many requests at once, of LoRA finetuning alone, and of both in the same iterations."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.table import Table

import flexcore
from flexcore.bench import _measure
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.ui import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--num-prompts", type=int, default=64, metavar="N")
    parser.add_argument("--input-len", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--train-len", type=int, default=512, metavar="TOKENS", help="tokens of a training sequence")
    parser.add_argument("--train-steps", type=int, default=8, metavar="N", help="optimizer steps of one sequence each")
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    engine = _measure.load_engine(args)
    rows = []
    for name, serving, training in (("serve", True, False), ("finetune", False, True), ("both", True, True)):
        if err.is_terminal:
            err.print(f"{name} ...", style="dim")
        rows.append({"mode": name, **_run(engine, args, serving, training)})
    memory = engine.memory_peak()
    write_json(args.json, {"machine": _measure.machine(engine), "throughput": rows, "memory_peak": memory})
    if args.json != "-":
        out.print(_table(rows))
        peak = ", ".join(f"{name} {format_bytes(count)}" for name, count in memory.items() if count)
        out.print(f"peak memory: {peak}", style="dim")
    return 0


def _run(engine: flexcore.Engine, args: argparse.Namespace, serving: bool, training: bool) -> dict[str, Any]:
    vocab = engine.model().vocab_size
    if training:
        engine.create_adapter("bench", options.adapter_of(args))
    _drive(engine, _measure.random_ids(16, vocab, 0), 1, 4)  # wakes threads and pages up
    job = None
    if training:
        rows = [_measure.random_ids(args.train_len, vocab, 10_000 + k) for k in range(args.train_steps)]
        examples = [flexcore.Example(ids, ids) for ids in rows]
        job = engine.finetune("bench", examples, flexcore.FinetuneConfig(batch_size=1))
    prompts = args.num_prompts if serving else 0
    seconds, served, trained = _drive(engine, None, prompts, args.output_len, args.input_len, vocab)
    if job is not None:
        if engine.job(job).status == "running":
            engine.cancel_job(job)
        engine.unload_adapter("bench")
    return {
        "seconds": seconds,
        "served_tokens_per_s": served / seconds,
        "trained_tokens_per_s": trained / seconds,
    }


def _drive(
    engine: flexcore.Engine,
    prompt: list[int] | None,
    count: int,
    output_len: int,
    input_len: int = 0,
    vocab: int = 0,
) -> tuple[float, int, float]:
    """Seconds, output tokens and trained tokens until all requests are done (or, with none, until the job is)."""
    prompts = [prompt or _measure.random_ids(input_len, vocab, k) for k in range(count)]
    if prompts:
        engine.submit_batch(prompts, _measure.greedy(output_len))
    left, served, before = len(prompts), 0, _measure.trained_tokens(engine)
    start = time.perf_counter()
    while engine.has_work() and (left or not prompts):
        report = engine.step()
        served += len(report.outputs)
        left -= sum(event.finish_reason is not None for event in report.outputs)
    return time.perf_counter() - start, served, _measure.trained_tokens(engine) - before


def _table(rows: list[dict[str, Any]]) -> Table:
    alone = {row["mode"]: row for row in rows}
    table = Table("mode", "seconds", "served tok/s", "trained tok/s", "kept of finetuning alone")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        kept = row["trained_tokens_per_s"] / (alone["finetune"]["trained_tokens_per_s"] or float("nan"))
        table.add_row(
            row["mode"],
            f"{row['seconds']:.1f}",
            f"{row['served_tokens_per_s']:,.0f}",
            f"{row['trained_tokens_per_s']:,.0f}",
            f"{kept:.0%}" if row["mode"] == "both" else "",
        )
    return table
