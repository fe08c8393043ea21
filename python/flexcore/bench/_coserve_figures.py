"""The co-serving benchmark as figures: what is kept against the rate, a burst, and predicted against measured steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flexcore import InvalidArgument

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OWN, SERVING = "#0b7285", "#495057"
STYLES = {  # policy -> label, colour
    "hybrid": ("flexcore", OWN),
    "temporal:64": ("temporal sharing, 64", "#e8590c"),
    "temporal:128": ("temporal sharing, 128", "#f4a261"),
    "temporal:512": ("temporal sharing, 512", "#f9d5b4"),
    "dynamic-temporal": ("dynamic temporal sharing", "#9c6644"),
    "token-cap:256": ("256 tokens a step", "#ae3ec9"),
    "spatial": ("two engines, same cores", "#748ffc"),
    "separate": ("two engines, half of the cores each", "#adb5bd"),
    "inference-only": ("serving alone", SERVING),
}


def draw(result: dict[str, Any], target: Path) -> list[Path]:
    """Writes `target`-rates, and -burst and -steps where there is something to show, as .png and .svg."""
    try:
        import matplotlib
    except ImportError:
        raise InvalidArgument("--figures: needs matplotlib (pip install flexcore[plot])") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "svg.hashsalt": "flexcore"}
    )
    figures = {"rates": _rates(pyplot, result)}
    shared = [run for run in result["runs"] if run["policy"] == "hybrid"]
    if shared:
        figures["steps"] = _steps(pyplot, result, shared)
        if result["traffic"]["burst"] > 1:
            figures["burst"] = _burst(pyplot, result, shared[-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            path = target.with_name(f"{target.name}-{name}{suffix}")
            figure.savefig(path, dpi=160, metadata=metadata, facecolor="white")
            written.append(path)
        pyplot.close(figure)
    return written


def _title(figure: Any, title: str, note: str) -> None:
    figure.text(0.02, 0.955, title, fontsize=13.5, fontweight="bold", va="center")
    figure.text(0.02, 0.905, note, fontsize=8.5, color=FAINT, va="center")


def _frame(axis: Any, title: str, unit: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axis.set_xlabel(unit, color=FAINT, fontsize=8.5)
    axis.tick_params(length=0, colors=INK, labelsize=8.5)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


def _where(result: dict[str, Any]) -> str:
    machine, slo = result["machine"], result["slo"]
    place = f"{machine['threads']} threads of {machine['cpu']}" if machine["device"] == "cpu" else machine["device"]
    return (
        f"{machine['model'].split('.')[0]}, {place}. Objective: {slo['tpot_ms']:.0f} ms a token, "
        f"{slo['ttft_ms']:,.0f} ms to the first, for {slo['attainment']:.0%} of the requests."
    )


def _rates(pyplot: Any, result: dict[str, Any]) -> Any:
    figure, (kept, tuned) = pyplot.subplots(1, 2, figsize=(10.4, 4.6))
    policies = dict.fromkeys(run["policy"] for run in result["runs"])
    for policy in sorted(policies, key=lambda name: name == "hybrid"):  # the own one on top
        runs = [run for run in result["runs"] if run["policy"] == policy]
        rates = [run["requests_per_s"] for run in runs]
        label, colour = STYLES.get(policy, (policy, FAINT))
        style = {
            "color": colour,
            "label": label,
            "marker": "o",
            "markersize": 5.5 if policy == "hybrid" else 4,
            "linewidth": 2.4 if policy == "hybrid" else 1.4,
            "linestyle": "--" if policy == "inference-only" else "-",
        }
        kept.plot(rates, [100 * run["attainment"] for run in runs], **style)
        if policy != "inference-only":
            finetuning = [100 * run["finetuning_kept"] for run in runs]
            tuned.plot(rates, finetuning, **{**style, "markerfacecolor": "white"})
            keeps = [run["attainment"] >= result["slo"]["attainment"] for run in runs]
            filled = (
                [value for value, keep in zip(column, keeps, strict=True) if keep] for column in (rates, finetuning)
            )
            tuned.plot(*filled, **{**style, "linestyle": "", "label": None, "zorder": 3})
    kept.axhline(100 * result["slo"]["attainment"], color=INK, linewidth=0.8, linestyle=":")
    kept.set_ylim(-3, 103)
    tuned.set_ylim(0, max(103, 3 + max(100 * run["finetuning_kept"] for run in result["runs"])))
    _frame(kept, "Requests that kept their objective, %", "requests a second")
    _frame(tuned, "Finetuning, % of finetuning alone", "requests a second; hollow: the objective was not kept")
    handles, labels = kept.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="lower center", ncol=4, frameon=False, fontsize=8.5)
    _title(figure, "Serving and finetuning at once", _where(result))
    rows = -(-len(handles) // 4)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.8, bottom=0.15 + 0.05 * rows, wspace=0.13)
    return figure


def _columns(run: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(values, dtype=float) for name, values in run["series"].items()}


def _steps(pyplot: Any, result: dict[str, Any], runs: list[dict[str, Any]]) -> Any:
    from matplotlib import ticker

    figure, axis = pyplot.subplots(figsize=(5.6, 5.4))
    series = [_columns(run) for run in runs]
    predicted, measured, tunes = (
        np.concatenate(parts)
        for parts in zip(*((s["predicted_ms"], s["elapsed_ms"], s["finetune_tokens"] > 0) for s in series), strict=True)
    )
    known = predicted > 0
    ends = (max(1.0, 0.8 * predicted[known].min()), 1.3 * max(predicted.max(), measured.max()))
    axis.fill_between(ends, [0.9 * e for e in ends], [1.1 * e for e in ends], color=GRID, zorder=1, linewidth=0)
    axis.plot(ends, ends, color=FAINT, linewidth=0.8, zorder=2)
    for mask, colour, label in ((~tunes, SERVING, "serving alone"), (tunes, OWN, "with finetuning")):
        axis.scatter(
            predicted[mask & known], measured[mask & known], s=7, color=colour, alpha=0.45, label=label, linewidths=0
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [base * 10**power for power in range(-1, 5) for base in (1, 2, 5) if ends[0] < base * 10**power < ends[1]]
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(ticker.FixedLocator(ticks))
        each.set_major_formatter(ticker.FormatStrFormatter("%g"))
        each.set_minor_locator(ticker.NullLocator())
    axis.set_xlim(ends)
    axis.set_ylim(ends)
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", markerscale=2)
    over = np.mean(measured[known] > 1.1 * predicted[known])
    late = sum(run["late_share"] * run["steps"] for run in runs) / sum(run["steps"] for run in runs)
    _frame(axis, "Step time measured, ms", "predicted, ms; grey: within 10%")
    note = f"{over:.1%} of {known.sum():,} steps took 10% more than this, {late:.1%} more than with the margin"
    _title(figure, "What steps were predicted to take, and took", note)
    figure.subplots_adjust(left=0.11, right=0.97, top=0.81, bottom=0.1)
    return figure


def _burst(pyplot: Any, result: dict[str, Any], run: dict[str, Any]) -> Any:
    figure, axes = pyplot.subplots(3, 1, figsize=(9.6, 5.6), sharex=True)
    steps, seconds = _columns(run), result["traffic"]["seconds"]
    edges = np.linspace(0, seconds, min(120, max(4, round(2 * seconds))) + 1)
    width = edges[1] - edges[0]

    def rate(values: Any) -> Any:
        return np.histogram(steps["end"], edges, weights=values)[0] / width

    panels = (
        ("Answers, tokens a second", rate(steps["decode_tokens"]), SERVING),
        ("Finetuning, tokens a second", rate(steps["finetune_tokens"]), OWN),
    )
    for axis, (title, values, colour) in zip(axes, panels, strict=False):
        axis.fill_between(edges[:-1], values, step="post", color=colour, linewidth=0, zorder=2)
        axis.set_ylim(0)
        _frame(axis, title, "")
    busy = steps["decode_tokens"] + steps["prefill_tokens"] > 0
    axes[2].scatter(steps["end"][busy], steps["elapsed_ms"][busy], s=5, color=SERVING, alpha=0.6, linewidths=0)
    axes[2].axhline(result["slo"]["tpot_ms"], color=INK, linewidth=0.8, linestyle=":")
    axes[2].set_ylim(0)
    axes[2].set_xlim(0, seconds)
    _frame(axes[2], "Steps with requests, ms (dotted: the objective)", "seconds")
    for axis in axes:
        axis.axvspan(seconds / 3, 2 * seconds / 3, color="#fff3bf", zorder=0, linewidth=0)
    times = (
        f"{result['traffic']['burst']:g} times the requests in the middle third. {run['attainment']:.1%} kept it all."
    )
    _title(figure, "A burst: finetuning gives way, and comes back", times)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.83, bottom=0.09, hspace=0.42)
    return figure
