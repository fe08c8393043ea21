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
    ("adapters", "parameters of the adapter, of a version and of the next in the making"),
    ("gradients", "its gradients, and those of the sequences in flight"),
    ("optimizer", "optimizer state"),
    ("workspace", "scratch of one step"),
)


# In host memory, beside the total.
_HOST_POOLS = (
    ("offloaded_activations", "of host memory: what the backward reads and the device has no room for"),
    ("swap_space", "of host memory: for what requests take the place of"),
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
    _add_parallel(parser)
    parser.add_argument("--json", metavar="FILE", help="- is standard output")
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    from flexcore.models import resolve_model

    with bytes_progress("converting") as progress:
        directory = resolve_model(options.model_of(args), progress)
    adapter = None if args.no_finetune else options.adapter_of(args)
    rates = flexcore.ParallelRates(**{name: getattr(args, name) for name in flexcore.ParallelRates._fields})
    plan = flexcore.plan(
        directory,
        options.engine_config(args),
        adapter,
        args.sequence_length,
        args.tensor_parallel_size,
        args.sequence_parallel,
        rates,
    )
    write_json(args.json, _as_dict(plan))
    if args.json == "-":
        return 0
    out.print(_pools(plan, args))
    if adapter is not None:
        kept, unpruned = plan.saved_bytes_per_token_per_layer, plan.unpruned_bytes_per_token_per_layer
        share = f" ({kept / unpruned:.0%} of {format_bytes(unpruned)} without pruning)" if unpruned else ""
        out.print(f"activations kept: {format_bytes(kept)} a token and layer{share}, {plan.num_layers} layers")
    if args.explain:
        out.print(_tensors(plan))
    if plan.parallel is not None:
        _print_parallel(plan, plan.parallel, args.explain)
    return 0


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several devices (planned and simulated; engines run on one)")
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks (default: 1)")
    group.add_argument("--sequence-parallel", action="store_true", help="split the residual stream over tokens")
    defaults = flexcore.ParallelRates()
    for name in flexcore.ParallelRates._fields:
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(defaults, name),
            metavar="X",
            help="of a rank (default: an H100's %(default)g)"
            if name != "collective_seconds"
            else "(default: %(default)g)",
        )


def _print_parallel(plan: flexcore.MemoryPlan, parallel: flexcore.ParallelPlan, explain: bool) -> None:
    out.print(_rank(plan, parallel))
    out.print(
        f"a rank sends {_wire(parallel.forward_bytes_per_token)} a token forward and "
        f"{_wire(parallel.backward_bytes_per_token)} backward for the model's own layers"
    )
    if not parallel.sites:
        return
    out.print(_sites(parallel))
    if not explain:
        return
    alike: dict[str, list[flexcore.ParallelSite]] = {}
    for site in parallel.sites:
        alike.setdefault(site.reason + repr(site.kept), []).append(site)
    for sites in alike.values():
        out.print(f"[bold]{', '.join(site.module for site in sites)}[/]: {sites[0].reason}")
        _print_kept(sites[0])


def _rank(plan: flexcore.MemoryPlan, parallel: flexcore.ParallelPlan) -> Table:
    residual = ", residual stream split over tokens" if parallel.sequence_parallel else ""
    title = f"memory of a rank, {parallel.tensor_parallel_size} ranks{residual}"
    table = Table(title=title, title_justify="left")
    table.add_column("pool")
    table.add_column("bytes", justify="right")
    table.add_column("of one device's", justify="right", style="dim")
    for name, _ in _POOLS:
        whole, part = getattr(plan, name), getattr(parallel, name, None)
        if part is not None:
            table.add_row(name, format_bytes(part), f"{part / whole:.0%}" if whole else "-")
    table.add_section()
    table.add_row("total", format_bytes(parallel.total), "", style="bold")
    return table


def _sites(parallel: flexcore.ParallelPlan) -> Table:
    table = Table(title="bypasses: the cheapest of all legal plans, by kind of linear", title_justify="left")
    for name in ("linear", "W", "x", "y"):
        table.add_column(name, no_wrap=True)
    table.add_column("plans", justify="right")
    table.add_column("chosen, forward", style="green")
    for name in ("sent a token", "back", "a step", "weights"):
        table.add_column(name, justify="right")
    for site in parallel.sites:
        table.add_row(
            f"{site.module} x{site.count}",
            site.weight,
            site.x,
            site.y,
            str(site.candidates),
            site.plan.split(", back")[0],
            _wire(site.forward_bytes_per_token),
            _wire(site.backward_bytes_per_token),
            format_bytes(site.step_bytes),
            format_bytes(site.parameter_bytes),
        )
    return table


def _print_kept(site: flexcore.ParallelSite) -> None:
    """Lines, which a narrow terminal leaves whole."""
    worse = site.candidates - site.equal - len(site.kept)
    out.print(
        f"  of {site.candidates} plans {worse} are no better than one of these anywhere, {site.equal} cost the same:"
    )
    widest = max(len(plan.plan) for plan in site.kept)
    out.print(
        f"  {'':{widest}}  us forward + back + step   sent              a rank's memory", style="dim", soft_wrap=True
    )
    for i, plan in enumerate(site.kept):
        times = f"{plan.forward_us:.2f} + {plan.backward_us:.2f} + {plan.step_us:.2f}"
        sent = f"{_wire(plan.bytes_per_token)} a token"
        line = f"  {plan.plan:{widest}}  {times:26} {sent:17} {format_bytes(plan.memory_bytes)}"
        out.print(line, style="green" if i == 0 else None, soft_wrap=True)


def _wire(value: float) -> str:
    return format_bytes(round(value))


def _pools(plan: flexcore.MemoryPlan, args: argparse.Namespace) -> Table:
    title = "memory"
    if plan.tokens_in_flight:
        title += (
            f", finetuning on sequences of {plan.sequence_length} tokens (at most {plan.max_sequence_length}),"
            f" {plan.tokens_in_flight} tokens in flight"
        )
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
    host = [(name, getattr(plan, name), purpose) for name, purpose in _HOST_POOLS if getattr(plan, name)]
    if host:
        table.add_section()
    for name, count, purpose in host:
        table.add_row(name, format_bytes(count), purpose)
    return table


def _tensors(plan: flexcore.MemoryPlan) -> Table:
    table = Table(title="forward tensors of one layer that the backward reads", title_justify="left")
    table.add_column("tensor")
    table.add_column("choice")
    table.add_column("bytes/token", justify="right")
    table.add_column("why", style="dim")
    styles = {"kept": "yellow", "offloaded": "magenta", "rebuilt": "green", "dropped": "green"}
    for tensor in plan.tensors:
        style = styles.get(tensor.choice, "cyan")
        table.add_row(tensor.name, f"[{style}]{tensor.choice}[/]", str(tensor.bytes_per_token), tensor.reason)
    return table


def _as_dict(plan: flexcore.MemoryPlan) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        fields = getattr(value, "_fields", None)
        return value if fields is None else {name: plain(getattr(value, name)) for name in fields}

    values: dict[str, Any] = plain(plan)
    return values
