"""Time of single batches: prefill (time to first token) and decode (time per output token), engine alone."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.table import Table

import flexcore
from flexcore.bench import _measure
from flexcore.cli import options
from flexcore.cli.console import out, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--input-len", type=int, nargs="+", default=[36, 1024], metavar="TOKENS")
    parser.add_argument("--output-len", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--num-iters", type=int, default=5, metavar="N", help="after one warm-up")
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    engine = _measure.load_engine(args)
    rows = [
        _case(engine, batch, length, args.output_len, args.num_iters)
        for batch in args.batch_size
        for length in args.input_len
    ]
    write_json(args.json, {"machine": _measure.machine(engine), "latency": rows})
    if args.json != "-":
        out.print(_table(rows))
    return 0


def _case(engine: flexcore.Engine, batch: int, length: int, tokens: int, repeats: int) -> dict[str, Any]:
    vocab = engine.model().vocab_size
    first: list[float] = []
    per_token: list[float] = []
    for turn in range(repeats + 1):
        prompts = [_measure.random_ids(length, vocab, turn * batch + k) for k in range(batch)]
        ttft, tpot = _once(engine, prompts, tokens)
        if turn:
            first.append(ttft)
            per_token.append(tpot)
    ttft_ms, tpot_ms = _measure.spread(first), _measure.spread(per_token)
    return {
        "batch_size": batch,
        "input_len": length,
        "output_len": tokens,
        "ttft_ms": ttft_ms,
        "tpot_ms": tpot_ms,
        "prefill_tokens_per_s": 1000 * batch * length / ttft_ms["median"],
        "decode_tokens_per_s": 1000 * batch / tpot_ms["median"] if tokens > 1 else None,
    }


def _once(engine: flexcore.Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Milliseconds until every sequence has its first token, and per token after that."""
    start = time.perf_counter()
    waiting = set(engine.submit_batch(prompts, _measure.greedy(tokens)))
    first = start
    while engine.has_work():
        report = engine.step()
        if waiting:
            waiting -= {event.request_id for event in report.outputs}
            first = time.perf_counter()
    end = time.perf_counter()
    return 1000 * (first - start), 1000 * (end - first) / max(tokens - 1, 1)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("batch", "input", "TTFT ms", "TPOT ms", "prefill tok/s", "decode tok/s")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        ttft, tpot = row["ttft_ms"], row["tpot_ms"]
        table.add_row(
            str(row["batch_size"]),
            str(row["input_len"]),
            f"{ttft['median']:.1f}",
            f"{tpot['median']:.2f}",
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.0f}" if row["decode_tokens_per_s"] else "-",
        )
    return table
