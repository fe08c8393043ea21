"""What storing the linears in 8 or 4 bits costs and gives: perplexity, bytes, speed, and the loss of finetuning."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

import flexcore
from flexcore.bench import _measure
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.datasets.reader import read_rows
from flexcore.tokenizer import Tokenizer
from flexcore.ui import format_bytes

_FORMATS = ["none", "int8/64", "int4/64", "nf4/64"]
_DECODED = ((1, "decode_ms"), (16, "decode_16_ms"))  # sequences at once
_LAST_STEPS = 20  # whose mean is the loss at the end: that of one step is mostly its examples'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--formats", nargs="+", default=_FORMATS, metavar="FORMAT[/GROUP]", help="none comes first")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for perplexity: .txt, or .jsonl with text")
    parser.add_argument("--text-tokens", type=options.positive, default=16384, metavar="N", help="of it, at most")
    parser.add_argument("--window", type=options.positive, default=512, metavar="TOKENS", help="scored at once")
    parser.add_argument("--data", type=Path, metavar="FILE", help="to finetune on, in any form that train takes")
    parser.add_argument("--train-steps", type=options.positive, default=200, metavar="N")
    parser.add_argument("--held-out", type=options.positive, default=32, metavar="N", help="examples of --data")
    parser.add_argument("--output-len", type=options.positive, default=48, metavar="TOKENS", help="decoded")
    parser.add_argument("--repeat", type=options.positive, default=3, metavar="N", help="rounds of timing, interleaved")
    options.add_finetune(parser)
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    args.max_model_len = max(args.max_model_len, args.window)
    for name in args.formats:
        flexcore.plan(options.model_of(args), options.engine_config(_stored_as(args, name)))  # refuses what is not one
    rows: dict[str, dict[str, Any]] = {
        name: {"format": name, "decode_ms": [], "decode_16_ms": [], "prefill_tokens_per_s": []}
        for name in ["none", *(name for name in args.formats if name != "none")]
    }
    machine: dict[str, Any] = {}
    for turn in range(args.repeat):
        for name, row in rows.items():
            if err.is_terminal:
                err.print(f"{name}, round {turn + 1} ...", style="dim")
            engine = _measure.load_engine(_stored_as(args, name))
            _time(engine, args, row)
            if turn == 0:
                machine = machine or _measure.machine(engine)
                row |= _sizes(engine) | _perplexity(engine, args) | _finetuned(engine, args)
            del engine
    for row in rows.values():
        dense = rows["none"]
        for value in ("decode_ms", "decode_16_ms", "prefill_tokens_per_s"):
            row[value] = _measure.spread(row[value]) if row[value] else None
        saved = dense["weight_bytes"] - row["weight_bytes"]
        row["linears_ratio"] = 1 - saved / dense["linear_bytes"]
        row["weights_ratio"] = row["weight_bytes"] / dense["weight_bytes"]
        for value in ("perplexity", "final_loss", "held_out_loss"):
            if value in row:
                row[f"{value}_change"] = row[value] / dense[value] - 1
    done = list(rows.values())
    result = {"machine": machine, "arguments": _arguments(args), "quantization": done}
    write_json(args.json, result)
    if args.json != "-":
        out.print(_table(done))
    return 0


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ("text_tokens", "window", "train_steps", "held_out", "output_len", "repeat")
    lora, finetune = options.adapter_of(args), _finetune_config(args)
    return {name: getattr(args, name) for name in names} | {"lora": repr(lora), "finetune": repr(finetune)}


def _stored_as(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The arguments with the linears in "int4/64"; "int4" has the groups of --quantization-group-size."""
    kind, _, group = name.partition("/")
    if group and not group.isdecimal():
        raise flexcore.InvalidArgument(f"--formats: got {name!r}, wanted FORMAT or FORMAT/GROUP, as int4/64")
    chosen = copy.copy(args)
    chosen.quantization = kind
    if group:
        chosen.quantization_group_size = int(group)
    return chosen


def _sizes(engine: flexcore.Engine) -> dict[str, Any]:
    model = engine.model()
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim  # q, o, k, v
    parameters = model.num_layers * model.hidden_size * (heads + 3 * model.intermediate_size)
    # Of the dense linears: what the others are a part of.
    return {
        "weight_bytes": engine.memory()["weights"],
        "linear_bytes": parameters * (4 if model.dtype == "float32" else 2),
    }


def _time(engine: flexcore.Engine, args: argparse.Namespace, row: dict[str, Any]) -> None:
    vocab = engine.model().vocab_size
    for batch, key in _DECODED:
        if batch > args.max_num_seqs:
            continue
        prompts = [_measure.random_ids(16, vocab, k) for k in range(batch)]
        engine.submit_batch(prompts, _measure.greedy(args.output_len))
        while engine.has_work():
            report = engine.step()
            if report.num_decode_tokens == batch and not report.num_prefill_tokens:
                row[key].append(report.elapsed_ms)
    length = min(args.window, engine.model().max_model_len - 1)
    for turn in range(3):
        engine.submit(_measure.random_ids(length, vocab, turn), _measure.greedy(1))
        elapsed = 0.0
        while engine.has_work():
            elapsed += engine.step().elapsed_ms
        row["prefill_tokens_per_s"].append(1e3 * length / elapsed)


def _perplexity(engine: flexcore.Engine, args: argparse.Namespace) -> dict[str, Any]:
    if args.text is None:
        return {}
    tokenizer = Tokenizer(engine.model_directory)
    total, count = 0.0, 0
    for ids in _windows(tokenizer, args, min(args.window, engine.model().max_model_len)):
        scores = engine.score(ids)
        total -= float(scores.sum(dtype="float64"))
        count += len(scores)
    if not count:
        raise flexcore.InvalidArgument(f"--text: {args.text} has no text to score")
    return {"perplexity": math.exp(total / count), "scored_tokens": count}


def _windows(tokenizer: Tokenizer, args: argparse.Namespace, length: int) -> list[list[int]]:
    """Of each text, one after the other, until there are tokens enough."""
    if args.text.suffix == ".txt":
        texts = [args.text.read_text(encoding="utf-8")]
    else:
        texts = [str(row.value.get("text", "")) for row in read_rows(args.text)]
    windows: list[list[int]] = []
    left = args.text_tokens
    for text in texts:
        ids = tokenizer.encode(text)[:left]
        left -= len(ids)
        windows += [ids[begin : begin + length] for begin in range(0, len(ids), length)]
    return [window for window in windows if len(window) > 1]


def _finetune_config(args: argparse.Namespace) -> flexcore.FinetuneConfig:
    return flexcore.FinetuneConfig(**({"num_epochs": 1, "batch_size": 2, "seed": 0} | options.given_finetune(args)))


def _finetuned(engine: flexcore.Engine, args: argparse.Namespace) -> dict[str, Any]:
    """The loss of an adapter's training, and on examples that it did not see. Same examples, in the same order."""
    if args.data is None:
        return {}
    config = _finetune_config(args)
    longest = min(args.window, engine.model().max_model_len)
    examples = flexcore.datasets.load(args.data, Tokenizer(engine.model_directory), longest).examples
    wanted = args.train_steps * config.batch_size
    if len(examples) < wanted + args.held_out:
        raise flexcore.InvalidArgument(
            f"--data: {args.data} has {len(examples)} examples, wanted {wanted + args.held_out}: "
            "steps times examples of a step, and those held out"
        )
    held_out = examples[wanted : wanted + args.held_out]
    lora = options.adapter_of(args)
    engine.create_adapter("bench", lora, seed=0)
    before = engine.loss_and_gradients("bench", held_out)["loss"]
    job = engine.finetune("bench", examples[:wanted], config)
    losses: list[float] = []
    elapsed = 0.0
    tokens = _measure.trained_tokens(engine)
    while engine.has_work():
        report = engine.step()
        elapsed += report.elapsed_ms
        losses += [event.loss for event in report.finetune if event.target_tokens]
    if engine.job(job).status != "succeeded":
        raise flexcore.Error(f"the job ended as {engine.job(job).status}: {engine.job(job).error}")
    return {
        "losses": [round(loss, 5) for loss in losses],
        "first_loss": statistics.mean(losses[:_LAST_STEPS]),
        "final_loss": statistics.mean(losses[-_LAST_STEPS:]),
        "held_out_loss_before": before,
        "held_out_loss": engine.loss_and_gradients("bench", held_out)["loss"],
        "trained_tokens_per_s": 1e3 * (_measure.trained_tokens(engine) - tokens) / elapsed,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("linears", "weights", "of the linears", "decode tok/s", "16 at once", "prefill tok/s")
    extra = [
        (title, value)
        for title, value in (
            ("perplexity", "perplexity"),
            ("loss at the end", "final_loss"),
            ("held out", "held_out_loss"),
        )
        if value in rows[0]
    ]
    for title, _ in extra:
        table.add_column(title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        rates = [batch * 1e3 / row[key]["median"] if row[key] else float("nan") for batch, key in _DECODED]
        table.add_row(
            row["format"],
            format_bytes(row["weight_bytes"]),
            f"{row['linears_ratio']:.3f}",
            *(f"{rate:,.1f}" for rate in rates),
            f"{row['prefill_tokens_per_s']['median']:,.0f}",
            *(f"{row[value]:.4g} ({row[f'{value}_change']:+.1%})" for _, value in extra),
        )
    return table
