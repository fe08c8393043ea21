"""`flexcore bench kernels --plan`: what the CUDA kernels of each kind of step cost at least, and how many they are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import flexcore
from flexcore.bench import _cuda_floors as floors
from flexcore.bench._cuda_launches import Card, Lora, Span
from flexcore.bench._shapes import PRESETS, Shape
from flexcore.cli import options
from flexcore.cli.console import out, write_json

DEFAULT = "llama-3.1-8b"
_BATCHES = (1, 16, 64)


@dataclass(frozen=True)
class Step:
    """A kind of step with its kernels; `tokens` is what it brings forward."""

    name: str
    what: str
    tokens: float
    kernels: list[floors.Kernel]

    @property
    def launches(self) -> int:
        return floors.launches(self.kernels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plan", "floors of the CUDA kernels; nothing is run, so no GPU is needed")
    card = Card()
    group.add_argument("--plan", action="store_true", help=f"of MODEL, or of {', '.join(PRESETS)}")
    group.add_argument("--batch-size", type=options.positive, default=16, metavar="N", help="sequences that decode")
    group.add_argument("--context-len", type=options.positive, default=1024, metavar="TOKENS", help="of each of them")
    group.add_argument(
        "--num-tokens", type=options.positive, default=512, metavar="N", help="of a prompt, a window, a backward unit"
    )
    group.add_argument("--lora-r", type=options.positive, default=16, metavar="N", help="on every linear of the layers")
    for option, value, unit, text in (
        ("--memory-tbps", card.bytes_per_s / 1e12, "TB/S", "memory, read and written"),
        ("--tflops", card.bfloat16_flops / 1e12, "TFLOP/S", "bfloat16, on tensor cores"),
        ("--float32-tflops", card.float32_flops / 1e12, "TFLOP/S", "not on tensor cores (an assumption)"),
        ("--launch-us", 2.0, "US", "what a launch adds (an assumption)"),
        ("--graph-launch-us", 1.0, "US", "the same in a CUDA graph (an assumption)"),
    ):
        group.add_argument(option, type=float, default=value, metavar=unit, help=f"{text}; default: %(default)g")


def run(args: argparse.Namespace) -> int:
    for option in ("memory_tbps", "tflops", "float32_tflops"):
        if getattr(args, option) <= 0:
            name = option.replace("_", "-")
            raise flexcore.InvalidArgument(f"--{name}: got {getattr(args, option)}, wanted more than 0")
    shape = shape_of(getattr(args, "model_or_path", None) or args.model or DEFAULT)
    card = Card(
        bytes_per_s=args.memory_tbps * 1e12,
        bfloat16_flops=args.tflops * 1e12,
        float32_flops=args.float32_tflops * 1e12,
    )
    shown = _shown(card, shape, args)
    counted = list(_counted(card, shape, args))
    assumed = {"launch_us": args.launch_us, "graph_launch_us": args.graph_launch_us}
    write_json(
        args.json,
        {
            "shape": asdict(shape),
            "parameters": shape.multiplied_parameters,
            "card": asdict(card),
            "assumed": assumed,
            "steps": [{**_row(card, step, args), "kernels": _kernels(card, step)} for step in shown],
            "launches": [_row(card, step, args) for step in counted],
        },
    )
    if args.json == "-":
        return 0
    out.print(
        f"[bold]{shape.name}[/] in bfloat16 on {card.name}: {args.memory_tbps:g} TB/s, {args.tflops:g} TFLOP/s on"
        f" tensor cores, {args.float32_tflops:g} TFLOP/s float32.\n"
        "Each launch reads its inputs and writes its outputs once.\n"
    )
    for step in shown:
        out.print(_step_table(card, step, args))
    out.print(_launch_table(card, counted, args))
    out.print(
        f"Floor: the times of all launches, each at full rate. Eager and graph: {args.launch_us:g} and"
        f" {args.graph_launch_us:g} us more for each, which are assumptions. A GEMM counts as one launch; copies of"
        " tables to the GPU are not counted.",
        style="dim",
    )
    return 0


def shape_of(model: str) -> Shape:
    """A preset, or what config.json or the GGUF file says."""
    if model.lower() in PRESETS:
        return PRESETS[model.lower()]
    path = Path(model).expanduser()
    if not path.exists() and "/" not in model:
        raise flexcore.InvalidArgument(
            f"model: {model!r} is neither a file nor a directory nor one of {', '.join(PRESETS)}"
        )
    if path.is_file() and path.suffix == ".gguf":
        from flexcore import gguf
        from flexcore.gguf.config import model_config

        return Shape.from_config(path.stem, model_config(gguf.Metadata(path), "bfloat16"))
    from flexcore.models import resolve_model

    directory = resolve_model(model)
    file = directory / "config.json"
    try:
        return Shape.from_config(directory.name, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise flexcore.ModelLoadError(f"model: {file}: {type(error).__name__}: {error}") from error


def _decode(card: Card, shape: Shape, batch: int, context: int, rank: int, adapters: int) -> Step:
    names = {0: "no adapter", 1: "1 adapter"}
    lora = Lora(rank, tuple(divided(batch, adapters))) if adapters else None
    kernels = floors.serving_step(card, shape, [Span(1, context - 1)] * batch, lora)
    return Step(f"decode, batch {batch}", names.get(adapters, f"{adapters} adapters"), batch, kernels)


def divided(rows: int, adapters: int) -> list[int]:
    return [(i + 1) * rows // adapters - i * rows // adapters for i in range(adapters)]


def _shown(card: Card, shape: Shape, args: argparse.Namespace) -> list[Step]:
    """Kernel by kernel."""
    tokens, rank = args.num_tokens, args.lora_r
    span, lora = Span(tokens), Lora(rank, (tokens,))
    prefill = floors.serving_step(card, shape, [span])
    window = floors.finetune_forward(card, shape, span, lora)
    unit = floors.backward_unit(card, shape, span, lora)
    where = f"1 adapter, one of {shape.num_layers} layers"
    return [
        _decode(card, shape, args.batch_size, args.context_len, rank, 1),
        Step(f"prefill, {tokens} tokens", "no adapter", tokens, prefill),
        Step(f"finetune forward, {tokens} tokens", "1 adapter", tokens, window),
        Step(
            f"backward unit, {tokens} tokens",
            where,
            tokens / shape.num_layers,
            unit,
        ),
    ]


def _counted(card: Card, shape: Shape, args: argparse.Namespace) -> Iterator[Step]:
    """In all, for several batches and adapters."""
    tokens, rank = args.num_tokens, args.lora_r
    for batch in _BATCHES:
        for adapters in sorted({0, 1, batch}):
            yield _decode(card, shape, batch, args.context_len, rank, adapters)
    span, lora = Span(tokens), Lora(rank, (tokens,))
    yield Step(f"prefill, {tokens} tokens", "no adapter", tokens, floors.serving_step(card, shape, [span]))
    yield Step(f"prefill, {tokens} tokens", "1 adapter", tokens, floors.serving_step(card, shape, [span], lora))
    forward = floors.finetune_forward(card, shape, span, lora)
    yield Step(f"finetune forward, {tokens} tokens", "1 adapter", tokens, forward)
    backward = []
    for layer in range(shape.num_layers):
        backward += floors.backward_unit(card, shape, span, lora, first_layer=layer == 0)
    yield Step(f"backward, all layers, {tokens} tokens", "1 adapter", tokens, backward)
    yield Step(f"forth and back, {tokens} tokens", "1 adapter", tokens, forward + backward)


def _row(card: Card, step: Step, args: argparse.Namespace) -> dict[str, Any]:
    floor = 1e6 * floors.seconds(step.kernels, card)
    eager, graph = floor + step.launches * args.launch_us, floor + step.launches * args.graph_launch_us
    return {
        "step": step.name,
        "what": step.what,
        "tokens": step.tokens,
        "launches": step.launches,
        "bytes": sum(kernel.bytes for kernel in step.kernels),
        "flops": sum(kernel.flops for kernel in step.kernels),
        "floor_us": floor,
        "eager_us": eager,
        "graph_us": graph,
        "tokens_per_s": {name: 1e6 * step.tokens / us for name, us in zip(_WAYS, (floor, eager, graph), strict=True)},
    }


_WAYS = ("floor", "eager", "graph")


def _bound(card: Card, kernel: floors.Kernel) -> str:
    if kernel.arithmetic_seconds(card) <= kernel.memory_seconds(card):
        return "memory"
    return "tensor cores" if kernel.rate == "bfloat16" else "float32"


def _kernels(card: Card, step: Step) -> list[dict[str, Any]]:
    return [
        {**asdict(kernel), "floor_us": 1e6 * kernel.seconds(card), "bound": _bound(card, kernel)}
        for kernel in step.kernels
    ]


def _table(title: str, columns: Sequence[str]) -> Table:
    # In 80 columns the names give way, not the numbers.
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def _brief(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def _step_table(card: Card, step: Step, args: argparse.Namespace) -> Table:
    table = _table(f"{step.name}: {step.what}", ("kernel", "launches", "MB", "GFLOP", "floor\nus", "of it"))
    table.add_column("bound by", no_wrap=True, min_width=12)
    total = floors.seconds(step.kernels, card)
    styles = {"memory": "cyan", "tensor cores": "green", "float32": "yellow"}
    for kernel in step.kernels:
        seconds, bound = kernel.seconds(card), _bound(card, kernel)
        table.add_row(
            kernel.name,
            f"{kernel.launches:,}",
            _brief(kernel.bytes / 1e6),
            _brief(kernel.flops / 1e9),
            _brief(1e6 * seconds),
            f"{seconds / total:.0%}",
            f"[{styles[bound]}]{bound}[/]",
            style="dim" if seconds < 0.01 * total else None,
        )
    row = _row(card, step, args)
    table.add_section()
    numbers = (f"{row['launches']:,}", _brief(row["bytes"] / 1e6), _brief(row["flops"] / 1e9))
    table.add_row("in all", *numbers, _brief(row["floor_us"]), "", "", style="bold")
    for name, key, each in (("eager", "eager_us", args.launch_us), ("in a graph", "graph_us", args.graph_launch_us)):
        added = row[key] / row["floor_us"] - 1
        table.add_row(f"{each:g} us a launch, {name}", "", "", "", _brief(row[key]), f"{added:+.0%}", "assumed")
    return table


def _launch_table(card: Card, steps: Sequence[Step], args: argparse.Namespace) -> Table:
    shown = _WAYS if out.width >= 112 else ()  # rates follow from the times
    columns = ("step", "adapters", "launches", *(f"{way}\nms" for way in _WAYS), *(f"{way}\ntok/s" for way in shown))
    table = _table("launches and what they add", columns)
    serving = True
    for step in steps:
        row = _row(card, step, args)
        if serving and not step.name.startswith(("decode", "prefill")):
            table.add_section()
            serving = False
        times = (f"{row[f'{way}_us'] / 1000:,.2f}" for way in _WAYS)
        rates = (f"{row['tokens_per_s'][way]:,.0f}" for way in shown)
        table.add_row(step.name, step.what.split()[0].replace("no", "-"), f"{step.launches:,}", *times, *rates)
    return table
