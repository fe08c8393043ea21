"""Requests and finetuning on one machine: what each policy keeps of both, against the rate of requests.

Replays arrivals (Poisson, or a trace: Azure LLM inference 2023, BurstGPT, Mooncake) at several rates while finetuning
jobs run, under flexcore's own policy and others in the same engine. Saturation is the highest rate at which serving
alone keeps the objective for the wanted share of requests; the rates are shares of it."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import flexcore
from flexcore import SLO
from flexcore.bench import _coserve_figures, _measure, _traces
from flexcore.bench._client import summary
from flexcore.bench._sharing import ALL, Engines, Finetuning, Place, Run, Step
from flexcore.bench._simulated import PROFILES, Profile, Simulated, profile
from flexcore.bench._traces import Arrival
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.tokenizer import Tokenizer
from flexcore.ui import percentile

SHARES = (0.1, 0.25, 0.5, 0.8)  # of saturation; the first is the light load
POLICIES = ("hybrid", "temporal:64", "temporal:128", "temporal:512", "separate")


@dataclass(frozen=True)
class Traffic:
    """What arrives. Without a trace: Poisson, lengths uniform between the bounds."""

    seconds: float = 30.0
    input_len: tuple[int, int] = (32, 128)
    output_len: tuple[int, int] = (16, 64)
    trace: str | None = None
    length_scale: float = 1.0  # of a trace's prompts and answers
    burst: float = 1.0  # so many times as many requests in the middle third
    seed: int = 1

    def arrivals(self, rate: float, most_tokens: int) -> list[Arrival]:
        if rate <= 0:
            return []
        if self.trace is None:
            arrivals = _traces.poisson(rate, self.seconds, self.input_len, self.output_len, self.seed)
        else:
            whole = _traces.read(self.trace)
            arrivals = _traces.scaled(whole, rate, self.seconds, self.length_scale, most_tokens)
        if self.burst > 1:
            arrivals = _traces.burst(arrivals, self.seconds / 3, 2 * self.seconds / 3, self.burst, self.seed)
        return arrivals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Traffic()
    options.add_model(parser)
    group = parser.add_argument_group("traffic")
    group.add_argument("--seconds", type=float, default=defaults.seconds, help="of each run (default: %(default)s)")
    group.add_argument(
        "--repeat", type=options.positive, default=1, metavar="N", help="runs of each, with other arrivals"
    )
    group.add_argument("--request-rate", type=float, nargs="+", metavar="PER_S", help="instead of shares of saturation")
    group.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of saturation (default: %(default)s)")
    group.add_argument("--saturation", type=float, metavar="PER_S", help="known from an earlier run: not searched for")
    group.add_argument("--input-len", type=int, nargs=2, default=defaults.input_len, metavar=("LOW", "HIGH"))
    group.add_argument("--output-len", type=int, nargs=2, default=defaults.output_len, metavar=("LOW", "HIGH"))
    group.add_argument("--trace", metavar="FILE", help="CSV of Azure or BurstGPT, JSON lines of Mooncake; may be gzip")
    group.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="of a trace's prompts and answers")
    group.add_argument("--burst", type=float, default=1.0, metavar="X", help="X times the requests in the middle third")
    group.add_argument(
        "--prompts", metavar="FILE", help="JSON lines with prompt, text or turns (default: random tokens)"
    )
    parser.add_argument(
        "--figures", metavar="PREFIX", help="write PREFIX-rates.png, .svg and others (needs matplotlib)"
    )
    group = parser.add_argument_group("sharing")
    group.add_argument("--policies", nargs="+", default=POLICIES, metavar="NAME", help=", ".join(ALL))
    group.add_argument("--train-len", type=int, default=512, metavar="TOKENS")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="finetuning jobs")
    parser.add_argument(
        "--simulate",
        metavar="PROFILE",
        help=f"no model: a virtual clock with the step times of a JSON file, or {', '.join(PROFILES)}",
    )
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    traffic = Traffic(
        args.seconds, tuple(args.input_len), tuple(args.output_len), args.trace, args.length_scale, args.burst
    )
    finetuning = Finetuning(options.adapter_of(args), args.train_len, jobs=args.jobs)

    slo = options.slo_of(args)
    place: Place
    guess = None
    if args.simulate:
        place = Simulated(profile(args.simulate), slo, finetuning)
    else:

        def load(threads: int) -> flexcore.Engine:
            return _measure.load_engine(argparse.Namespace(**{**vars(args), "num_threads": threads}))

        engine = load(args.num_threads)
        texts = None
        if args.prompts:
            tokenizer = Tokenizer(engine.model_directory)
            texts = [tokenizer.encode(text) for text in _measure.read_prompts(Path(args.prompts))]
        place = Engines(engine, slo, finetuning, load, texts)
        guess = Simulated(Profile.of(engine, options.engine_config(args)), slo, finetuning)
    bench = Benchmark(place, slo, traffic, finetuning, guess)
    result = bench.run(args.request_rate, args.shares, args.policies, args.saturation, args.repeat)
    write_json(args.json, result)
    if args.json != "-":
        out.print(table(result))
    if args.figures:
        for path in _coserve_figures.draw(result, Path(args.figures)):
            err.print(f"wrote {path}", style="dim")
    return 0


class Benchmark:
    """Every policy meets the same arrivals at a rate. `guess` is where the search for saturation begins."""

    def __init__(self, place: Place, slo: SLO, traffic: Traffic, finetuning: Finetuning, guess: Place | None = None):
        self._place, self._slo, self._traffic, self._finetuning = place, slo, traffic, finetuning
        self._guess = guess

    def run(
        self,
        rates: Sequence[float] | None,
        shares: Sequence[float],
        policies: Sequence[str],
        saturation: float | None = None,
        repeats: int = 1,
    ) -> dict[str, Any]:
        for name in policies:
            self._place.check(name)  # an unknown one is refused before anything runs
        if rates is None:
            saturation = saturation or self.saturation()
            rates = [share * saturation for share in shares]
        runs: dict[tuple[float, str], list[Run]] = {}
        alone: list[float] = []
        # One after the other and again: a machine that is slower for a while is so for all of them.
        for rate in rates:
            for repeat in range(repeats):
                _say("finetuning alone")
                alone.append(self._place.run("finetune-only", [], self._traffic.seconds).finetune_tokens_per_s)
                for policy in ("inference-only", *policies):
                    _say(f"{rate:.2f} requests/s, {policy}")
                    run = self._place.run(policy, self._arrivals(rate, repeat), self._traffic.seconds)
                    runs.setdefault((rate, policy), []).append(run)
        result: dict[str, Any] = {
            "machine": self._place.describe(),
            "slo": {"tpot_ms": self._slo.tpot_ms, "ttft_ms": self._slo.ttft_ms, "attainment": self._slo.attainment},
            "traffic": asdict(self._traffic),
            "repeats": repeats,
            "train_len": self._finetuning.train_len,
            "jobs": self._finetuning.jobs,
            "saturation_requests_per_s": saturation,
            "finetune_alone_tokens_per_s": statistics.median(alone),
            "finetune_alone_tokens_per_s_of_runs": alone,
            "runs": [],
        }
        for (rate, policy), several in runs.items():
            record = _record(policy, rate, several, self._slo, result["finetune_alone_tokens_per_s"])
            if policy == "inference-only":
                busy = record["busy_share"]
            else:
                record["sharing_efficiency"] = record["finetuning_kept"] + busy
            result["runs"].append(record)
        _compare_with_light_load(result["runs"])
        return result

    def saturation(self) -> float:
        """To within a tenth."""
        rate = 0.25
        if self._guess is not None:
            rate = self._search(rate, 2.0, self._guess)
        rate = self._search(rate, 1.25, self._place)
        return rate * 1.1 if self._holds(rate * 1.1, self._place) else rate

    def _search(self, rate: float, factor: float, place: Place) -> float:
        """The last of rate * factor^k that holds."""
        if self._holds(rate, place):
            while self._holds(rate * factor, place):
                rate *= factor
            return rate
        while rate > 1e-3 and not self._holds(rate / factor, place):
            rate /= factor
        return rate / factor

    def _holds(self, rate: float, place: Place) -> bool:
        _say(f"saturation: {rate:.2f} requests/s")
        run = place.run("inference-only", self._arrivals(rate), self._traffic.seconds)
        return summary(run.visits, run.seconds, self._slo)["attainment"] >= self._slo.attainment

    def _arrivals(self, rate: float, repeat: int = 0) -> list[Arrival]:
        return replace(self._traffic, seed=self._traffic.seed + repeat).arrivals(rate, self._place.max_tokens)


def _record(policy: str, rate: float, runs: Sequence[Run], slo: SLO, alone: float) -> dict[str, Any]:
    """Requests and steps of all runs together, rates as means."""
    steps = [step for run in runs for step in run.steps if step.predicted_ms > 0]
    reactions = [reaction for run in runs for reaction in run.reactions()]

    def mean(name: str) -> float:
        return statistics.fmean(getattr(run, name) for run in runs)

    def share_of_steps(late: Callable[[Step], bool]) -> float:
        return sum(late(step) for step in steps) / len(steps) if steps else 0.0

    finetuned = mean("finetune_tokens_per_s")
    return {
        "policy": policy,
        "requests_per_s": rate,
        **summary([visit for run in runs for visit in run.visits], sum(run.seconds for run in runs), slo),
        "finetune_forward_tokens_per_s": mean("finetune_forward_tokens_per_s"),
        "finetune_tokens_per_s": finetuned,
        "trained_tokens_per_s": mean("trained_tokens_per_s"),
        "finetuning_kept": finetuned / alone if alone else 0.0,
        "busy_share": mean("busy_share"),
        "reaction_p99_ms": 1000 * percentile([seconds for seconds, _ in reactions] or [0.0], 99),
        "reaction_max_steps": max((count for _, count in reactions), default=0),
        "steps": sum(len(run.steps) for run in runs),
        "overrun_share": share_of_steps(lambda step: step.elapsed_ms > 1.1 * step.predicted_ms),
        "late_share": share_of_steps(lambda step: step.elapsed_ms > 1.1 * step.predicted_upper_ms),
        **({"series": _series(runs[0])} if policy == "hybrid" else {}),  # for the figures
    }


def _series(run: Run) -> dict[str, list[float]]:
    """Step by step, column by column, rounded."""
    names = ("end", "elapsed_ms", "predicted_ms", "decode_tokens", "prefill_tokens", "finetune_tokens")
    return {name: [round(getattr(step, name), 3) for step in run.steps] for name in names}


def _compare_with_light_load(runs: list[dict[str, Any]]) -> None:
    light: dict[str, float] = {}
    for record in runs:
        reference = light.setdefault(record["policy"], record["finetune_tokens_per_s"])
        record["finetuning_kept_of_light_load"] = record["finetune_tokens_per_s"] / reference if reference else 0.0


def _say(what: str) -> None:
    if err.is_terminal:
        err.print(f"{what} ...", style="dim")


def table(result: dict[str, Any]) -> Table:
    names = (
        "req/s",
        "policy",
        "SLO\nkept",
        "TPOT ms\np50 / p99",
        "TTFT\np99",
        "tuned\ntok/s",
        "of\nalone",
        "eff.",
    )
    grid = Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)  # eighty columns
    for column, name in zip(grid.columns, names, strict=True):
        column.justify = "left" if name == "policy" else "right"
        column.no_wrap = True
    grid.add_row("", "finetune-only", "", "", "", f"{result['finetune_alone_tokens_per_s']:,.0f}", "100%", "")
    rate = None
    for record in result["runs"]:
        if record["requests_per_s"] != rate:
            grid.add_section()
        alone = "sharing_efficiency" not in record
        served = "p99_tpot_ms" in record
        grid.add_row(
            f"{record['requests_per_s']:.2f}" if record["requests_per_s"] != rate else "",
            f"alone, load {record['busy_share']:.2f}" if alone else record["policy"],
            f"{record['attainment']:.1%}",
            f"{record['median_tpot_ms']:.0f} / {record['p99_tpot_ms']:.0f}" if served else "",
            f"{record['p99_ttft_ms']:,.0f}" if served else "",
            "" if alone else f"{record['finetune_tokens_per_s']:,.0f}",
            "" if alone else f"{record['finetuning_kept']:.0%}",
            "" if alone else f"{record['sharing_efficiency']:.2f}",
            style="bold" if record["policy"] == "hybrid" else None,
        )
        rate = record["requests_per_s"]
    return grid
