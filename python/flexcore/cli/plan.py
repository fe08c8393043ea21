"""flexcore plan MODEL: the memory table, without loading weights"""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

import flexcore
from flexcore.cli import options
from flexcore.cli.console import bytes_progress, out, write_json
from flexcore.ui import format_bytes

_POOLS = (
    ("weights", "the frozen model"),
    ("kv_pages", "keys and values, of requests and of training sequences"),
    ("saved_activations", "what the backward reads of the training sequences in flight"),
    ("adapters", "LoRA parameters, of a version and of the next in the making"),
    ("gradients", "LoRA gradients, and those of the sequences in flight"),
    ("optimizer", "optimizer state"),
    ("workspace", "scratch of one step"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="of the training sequence (default: 1024, or what the model or --max-model-len allow)",
    )
    parser.add_argument("--no-finetune", action="store_true", help="serving only")
    parser.add_argument("--explain", action="store_true", help="what is kept, rebuilt and dropped, and why")
    parser.add_argument("--json", metavar="FILE", help="- is standard output")
    options.add_lora(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    from flexcore.models import resolve_model

    with bytes_progress("converting") as progress:
        directory = resolve_model(options.model_of(args), progress)
    lora = None if args.no_finetune else options.lora_config(args)
    plan = flexcore.plan(directory, options.engine_config(args), lora, args.sequence_length)
    write_json(args.json, _as_dict(plan))
    if args.json == "-":
        return 0
    out.print(_pools(plan, args))
    if lora is not None:
        kept, unpruned = plan.saved_bytes_per_token_per_layer, plan.unpruned_bytes_per_token_per_layer
        share = f" ({kept / unpruned:.0%} of {format_bytes(unpruned)} without pruning)" if unpruned else ""
        out.print(f"activations kept: {format_bytes(kept)} a token and layer{share}, {plan.num_layers} layers")
    if args.explain:
        out.print(_tensors(plan))
    return 0


def _pools(plan: flexcore.MemoryPlan, args: argparse.Namespace) -> Table:
    title = "memory"
    if plan.tokens_in_flight:
        title += f", finetuning on sequences of {plan.sequence_length} tokens, {plan.tokens_in_flight} tokens in flight"
    table = Table(title=title, title_justify="left")
    table.add_column("pool")
    table.add_column("bytes", justify="right")
    table.add_column("what for", style="dim")
    for name, purpose in _POOLS:
        if name == "weights" and args.quantization not in (None, "none"):
            purpose += f", linears in {args.quantization}, groups of {args.quantization_group_size}"
        table.add_row(name, format_bytes(getattr(plan, name)), purpose)
    table.add_section()
    table.add_row("total", format_bytes(plan.total), style="bold")
    return table


def _tensors(plan: flexcore.MemoryPlan) -> Table:
    table = Table(title="forward tensors of one layer that the backward reads", title_justify="left")
    table.add_column("tensor")
    table.add_column("choice")
    table.add_column("bytes/token", justify="right")
    table.add_column("why", style="dim")
    styles = {"kept": "yellow", "rebuilt": "green", "dropped": "green"}
    for tensor in plan.tensors:
        style = styles.get(tensor.choice, "cyan")
        table.add_row(tensor.name, f"[{style}]{tensor.choice}[/]", str(tensor.bytes_per_token), tensor.reason)
    return table


def _as_dict(plan: flexcore.MemoryPlan) -> dict[str, Any]:
    values = {name: getattr(plan, name) for name in plan._fields if name != "tensors"}
    values["tensors"] = [{name: getattr(tensor, name) for name in tensor._fields} for tensor in plan.tensors]
    return values
