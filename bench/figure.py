"""A comparison as one figure: python bench/figure.py bench/results/smollm2_cpu.json (or memory_peers_cpu.json)"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results import measurements

from flexcore.bench._coserve_figures import FAINT, GRID, INK, OWN

STYLES = {  # name -> label, colour
    "flexcore": ("flexcore", OWN),
    "transformers bf16": ("transformers\n+ PEFT bf16", "#adb5bd"),
    "transformers fp32": ("transformers\n+ PEFT fp32", "#ced4da"),
    "llama.cpp bf16": ("llama.cpp bf16", "#f4a261"),
    "llama.cpp f16": ("llama.cpp f16", "#f6bd8b"),
    "llama.cpp Q4_1": ("llama.cpp Q4_1", "#f9d5b4"),
}
TITLES = {
    "decode_1": "Decode, batch 1",
    "prefill": "Prefill, {prefill:,} tokens",
    "finetune": "LoRA finetuning, {train} tokens",
    "finetune_peak_bytes": "Finetuning memory above weights",
}


def draw(record: dict, target: Path) -> None:
    """Writes target.svg and target.png."""
    figure, axes = plt.subplots(2, 3, figsize=(11.2, 5.9), facecolor="white")
    names = [name for name in STYLES if name in record["systems"]]
    panels = list(axes.flat)
    for axis, (key, _, unit) in zip(panels, measurements(record["workload"]), strict=False):
        _bars(axis, record, names, key, unit)
    _coserve(panels[-1], record.get("coserve"))
    machine = record["machine"]
    model = record["model"]["name"].replace("-Instruct", "")
    figure.text(
        0.015, 0.965, f"{model} on {machine['threads']} CPU threads", fontsize=15, fontweight="bold", va="center"
    )
    isa = machine["isa"].split(",")[0].upper().replace("_", "-")
    note = (
        f"{machine['cpu']}, {isa}. Dashed: what this machine's memory or arithmetic allows with bf16 weights; "
        "under memory, the adapter's parameters, gradients and optimizer state alone."
    )
    figure.text(0.015, 0.918, note, fontsize=8.5, color=FAINT, va="center")
    figure.subplots_adjust(left=0.105, right=0.975, top=0.83, bottom=0.045, wspace=0.42, hspace=0.36)
    _save(figure, target)


def _save(figure, target: Path) -> None:
    for suffix in (".svg", ".png"):
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(target.with_suffix(suffix), dpi=160, metadata=metadata)
    plt.close(figure)


def _bars(axis, record: dict, names: list[str], key: str, unit: str) -> None:
    systems = record["systems"]
    rows = len(names)
    names = [name for name in names if systems[name]["results"].get(key)]
    scale = 1e-6 if unit == "MB" else 1.0
    values = [scale * systems[name]["results"][key] for name in names]
    best = scale * systems["flexcore"]["floors"][key]["best"]
    top = max(best, *values)
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        axis.barh(row, value, height=0.68, color=STYLES[name][1], zorder=2)
        axis.text(
            value + 0.02 * top,
            row,
            _short(value),
            va="center",
            fontweight="bold" if name == "flexcore" else "normal",
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    axis.axvline(best, ymin=1 - (len(names) + 0.1) / (rows + 0.1), color=INK, ls=(0, (3, 2)), linewidth=1, zorder=3)
    title = TITLES.get(key, f"Decode, batch {record['workload']['batch']}").format(**record["workload"])
    _frame(axis, title, f"{unit}, less is better" if unit == "MB" else unit, [STYLES[name][0] for name in names])
    axis.set_xlim(0, 1.2 * top)
    axis.set_ylim(rows - 0.5, -0.6)
    if len(names) < rows:
        axis.text(0.02 * top, len(names), "llama.cpp does not train LoRA", va="center", fontsize=8.5, color=FAINT)


def _coserve(axis, coserve: dict | None) -> None:
    if coserve is None:
        axis.axis("off")
        return
    rows = [("alone", 1.0, "")]
    for load in coserve["loads"]:
        both = load["coserving"]
        name = f"{load['load']} load\n{both['requests_per_s']:.1f} requests/s"
        rows.append((name, both["finetuning_kept"], _latency(both)))
    for row, (_, kept, note) in enumerate(rows):
        axis.barh(row, 100 * kept, height=0.42, color=OWN, alpha=1.0 if row else 0.35, zorder=2)
        axis.text(100 * kept + 2, row, f"{kept:.0%}", va="center", fontweight="bold", zorder=4)
        axis.text(1, row + 0.36, note, va="center", fontsize=8, color=FAINT)
    _frame(axis, "Finetuning kept while serving", "% of finetuning alone", [name for name, _, _ in rows])
    axis.set_xlim(0, 120)
    axis.set_ylim(len(rows) - 0.4, -0.45)


def _latency(served: dict) -> str:
    if "p99_tpot_ms" not in served:
        return ""
    return f"time per token: p50 {served['median_tpot_ms']:.0f} ms, p99 {served['p99_tpot_ms']:.0f} ms"


def _frame(axis, title: str, unit: str, labels: list[str]) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=17)
    axis.text(0, 1.025, unit, transform=axis.transAxes, fontsize=8.5, color=FAINT)
    axis.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axis.get_yticklabels()[0].set_fontweight("bold")
    axis.tick_params(axis="both", length=0, colors=INK)
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(GRID)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


MEMORY_STYLES = {  # name -> label, colour, dashes
    "PEFT": ("transformers + PEFT", "#8d99ae", "-"),
    "PEFT checkpointing": ("PEFT, gradient checkpointing", "#8d99ae", (0, (4, 2))),
    "flexcore": ("flexcore", OWN, "-"),
    "flexcore int8": ("flexcore, 8-bit activations", OWN, (0, (4, 2))),
    "flexcore least": ("flexcore, least memory", OWN, (0, (1, 1.5))),
}


def draw_memory(record: dict, target: Path) -> None:
    """Writes target.svg and target.png, of what memory_peers.py measured."""
    figure, axes = plt.subplots(1, 3, figsize=(11.2, 4.4), facecolor="white")
    machine = record["machine"]
    names = [name for name in MEMORY_STYLES if any(row["system"] == name for row in record["lengths"])]
    _lines(axes[0], record, names, "peak_above_weights_bytes", 1e-6, "Finetuning memory above weights", "MB", True)
    _lines(axes[1], record, names, "tokens_per_s", 1.0, "Finetuning", "tokens/s", False)
    _longest(axes[2], record)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.01, 0.0), ncols=5, frameon=False, fontsize=8.5)
    model = record["model"].split(".")[0].replace("-Instruct", "")
    figure.text(
        0.015, 0.95, f"LoRA finetuning of {model} in little memory", fontsize=15, fontweight="bold", va="center"
    )
    note = (
        f"{machine['cpu']}, {machine['threads']} threads. One sequence a step, LoRA r=16 at every linear, AdamW; peak "
        f"resident memory. flexcore in {machine['dtype']}, PEFT in {machine['peer_dtype']}."
    )
    figure.text(0.015, 0.885, note, fontsize=8.5, color=FAINT, va="center")
    figure.subplots_adjust(left=0.06, right=0.975, top=0.72, bottom=0.2, wspace=0.3)
    _save(figure, target)


def _lines(axis, record: dict, names: list[str], key: str, scale: float, title: str, unit: str, log: bool) -> None:
    lengths = sorted({row["length"] for row in record["lengths"]})
    for name in names:
        label, colour, dashes = MEMORY_STYLES[name]
        rows = [row for row in record["lengths"] if row["system"] == name and "error" not in row]
        points = [(n, [scale * row[key] for row in rows if row["length"] == n]) for n in lengths]
        points = [(n, statistics.median(values)) for n, values in points if values]
        axis.plot(
            *zip(*points, strict=True), color=colour, ls=dashes, marker="o", markersize=3.5, label=label, zorder=3
        )
        if log:
            axis.annotate(
                f"{points[-1][1]:,.0f}", points[-1], (5, 0), textcoords="offset points", va="center", fontsize=8
            )
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_xlim(lengths[0] / 1.1, lengths[-1] * (1.6 if log else 1.1))
    if log:
        axis.set_yscale("log")
        ticks = [
            tick for tick in (100, 200, 500, 1000, 2000, 5000, 10000) if axis.get_ylim()[0] < tick < axis.get_ylim()[1]
        ]
        axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    else:
        axis.set_ylim(0)
    axis.grid(color=GRID, linewidth=0.7, zorder=0)
    _plain(axis, title, f"{unit}{', less is better' if log else ''}, by tokens of a sequence")


def _longest(axis, record: dict) -> None:
    rows = record["longest"]
    if not rows:
        axis.axis("off")
        return
    limits = sorted({row["limit_gb"] for row in rows})
    names = [name for name in MEMORY_STYLES if any(row["system"] == name for row in rows)]
    height = 0.8 / len(names)
    top = max(row["length"] for row in rows)
    for index, limit in enumerate(limits):
        for at, name in enumerate(names):
            row = next((r for r in rows if r["limit_gb"] == limit and r["system"] == name), None)
            if row is None:
                continue
            _, colour, dashes = MEMORY_STYLES[name]
            y = index + (at - (len(names) - 1) / 2) * height
            axis.barh(
                y, row["length"], height=0.85 * height, color=colour, alpha=1 if dashes == "-" else 0.55, zorder=2
            )
            late = " or more" if row.get("ended_by") == "time" else ""
            axis.text(row["length"] + 0.02 * top, y, f"{row['length']:,}{late}", va="center", fontsize=8)
    axis.set_yticks(range(len(limits)), [f"{limit:g} GB" for limit in limits])
    axis.set_xlim(0, 1.35 * top)
    axis.set_xticks([])
    axis.invert_yaxis()
    _plain(axis, "Longest sequence", "tokens, in a process of so much memory in all")


def _plain(axis, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=17)
    axis.text(0, 1.03, unit, transform=axis.transAxes, fontsize=8.5, color=FAINT)
    axis.tick_params(axis="both", which="both", length=0, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(GRID)


if __name__ == "__main__":
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "svg.hashsalt": "flexcore"})
    path = Path(sys.argv[1])
    record = json.loads(path.read_text())
    (draw_memory if "lengths" in record else draw)(record, path)
