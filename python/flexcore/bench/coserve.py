"""Requests and finetuning on one machine: what each policy keeps of both, against the rate of requests.

Replays arrivals (Poisson, or a trace: Azure LLM inference 2023, BurstGPT, Mooncake) at several rates while finetuning
jobs run, under flexcore's own policy and others in the same engine. Saturation is the highest rate at which serving
alone keeps the objective for the wanted share of requests; the rates are shares of it."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

import flexcore
from flexcore import SLO
from flexcore.bench import _coserve_figures, _measure, _traces
from flexcore.bench._client import summary
from flexcore.bench._sharing import (
    ALL,
    TWO_ENGINES,
    Finetuning,
    Neighbour,
    Run,
    drive,
    on_cores,
    start_jobs,
    stop_jobs,
)
from flexcore.bench._traces import Arrival
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.datasets.reader import read_rows
from flexcore.tokenizer import Tokenizer

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
    group.add_argument(
        "--attainment", type=float, default=SLO().attainment, help="share of requests (default: %(default)s)"
    )
    options.add_lora(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    traffic = Traffic(
        args.seconds, tuple(args.input_len), tuple(args.output_len), args.trace, args.length_scale, args.burst
    )
    finetuning = Finetuning(options.lora_config(args), args.train_len, jobs=args.jobs)

    def load(threads: int) -> flexcore.Engine:
        return _measure.load_engine(argparse.Namespace(**{**vars(args), "num_threads": threads}))

    engine = load(args.num_threads)
    texts = _texts(Path(args.prompts), engine) if args.prompts else None
    bench = Benchmark(engine, SLO(args.tpot_ms, args.ttft_ms, args.attainment), traffic, finetuning, load, texts)
    result = bench.run(args.request_rate, args.shares, args.policies, args.saturation)
    write_json(args.json, result)
    if args.json != "-":
        out.print(table(result))
    if args.figures:
        for path in _coserve_figures.draw(result, Path(args.figures)):
            err.print(f"wrote {path}", style="dim")
    return 0


class Benchmark:
    """The policies of one engine share `engine`; those of two load others, with so many threads. Every policy meets the
    same arrivals at a rate. Prompts are cut from `texts`, or random tokens."""

    def __init__(
        self,
        engine: flexcore.Engine,
        slo: SLO,
        traffic: Traffic,
        finetuning: Finetuning,
        load: Callable[[int], flexcore.Engine] | None = None,
        texts: Sequence[Sequence[int]] | None = None,
    ):
        self._engine, self._slo, self._load = engine, slo, load
        self._traffic, self._finetuning, self._texts = traffic, finetuning, texts
        self._engine.set_slo(slo)
        self._most_tokens = engine.model().max_model_len

    def run(
        self,
        rates: Sequence[float] | None,
        shares: Sequence[float],
        policies: Sequence[str],
        saturation: float | None = None,
    ) -> dict[str, Any]:
        for name in policies:
            if name not in TWO_ENGINES:
                self._engine.set_policy(name)  # an unknown one is refused before anything runs
        if rates is None:
            saturation = saturation or self.saturation()
            rates = [share * saturation for share in shares]
        alone = self._finetuning_alone()
        result: dict[str, Any] = {
            "machine": _measure.machine(self._engine),
            "slo": {"tpot_ms": self._slo.tpot_ms, "ttft_ms": self._slo.ttft_ms, "attainment": self._slo.attainment},
            "traffic": asdict(self._traffic),
            "train_len": self._finetuning.train_len,
            "jobs": self._finetuning.jobs,
            "saturation_requests_per_s": saturation,
            "finetune_alone_tokens_per_s": alone,
            "runs": [],
        }
        for rate in rates:
            _say(f"{rate:.2f} requests/s, serving alone")
            serving = self._record("inference-only", rate, self.serve_alone(rate), alone)
            result["runs"].append(serving)
            for policy in policies:
                _say(f"{rate:.2f} requests/s, {policy}")
                record = self._record(policy, rate, self.share(policy, rate), alone)
                record["sharing_efficiency"] = record["finetuning_kept"] + serving["busy_share"]
                result["runs"].append(record)
        _compare_with_light_load(result["runs"])
        return result

    def serve_alone(self, rate: float) -> Run:
        self._engine.set_policy("inference-only")
        return self._drive(self._engine, rate)

    def share(self, policy: str, rate: float) -> Run:
        if policy in TWO_ENGINES:
            return self._share_with_another(policy, rate)
        self._engine.set_policy(policy)
        jobs = start_jobs(self._engine, self._finetuning)
        try:
            self._warm_up(self._engine)
            return self._drive(self._engine, rate)
        finally:
            stop_jobs(self._engine, jobs)

    def saturation(self) -> float:
        """To within a tenth. The search begins where the scheduler's own step times, simulated, would saturate."""
        _say("saturation, simulated")
        rate = self._search(0.25, 2.0, self._holds_simulated)
        rate = self._search(rate, 1.25, self._holds)
        return rate * 1.1 if self._holds(rate * 1.1) else rate

    def _search(self, rate: float, factor: float, holds: Callable[[float], bool]) -> float:
        """The last of rate * factor^k that holds."""
        if holds(rate):
            while holds(rate * factor):
                rate *= factor
            return rate
        while rate > 1e-3 and not holds(rate / factor):
            rate /= factor
        return rate / factor

    def _holds(self, rate: float) -> bool:
        _say(f"saturation: {rate:.2f} requests/s")
        run = self.serve_alone(rate)
        return summary(run.visits, run.seconds, self._slo)["attainment"] >= self._slo.attainment

    def _holds_simulated(self, rate: float) -> bool:
        kept = self.simulate("inference-only", rate).answers["kept"]
        return len(kept) == 0 or float(np.mean(kept)) >= self._slo.attainment

    def simulate(self, policy: str, rate: float) -> flexcore.Simulation:
        """About the same run with a virtual clock, by the step times that the engine knows now; max_num_seqs and
        max_num_batched_tokens are the default ones."""
        model, stats = self._engine.model(), self._engine.stats()
        prefix = "step_time_ms."
        config = flexcore.SimulationConfig(
            engine=flexcore.EngineConfig(slo=self._slo, policy=policy, block_size=model.block_size),
            num_layers=model.num_layers,
            num_blocks=model.num_blocks,
            step_time_ms={name[len(prefix) :]: value for name, value in stats.items() if name.startswith(prefix)},
            duration_ms=1000 * self._traffic.seconds,
        )
        arrivals = self._traffic.arrivals(rate, self._most_tokens)
        requests = [flexcore.SimulatedRequest(1000 * a.at, a.prompt_tokens, a.output_tokens) for a in arrivals]
        job = flexcore.SimulatedJob([self._finetuning.train_len], self._finetuning.batch_size)
        return flexcore.simulate(requests, [job] * self._finetuning.jobs, config)

    def _finetuning_alone(self) -> float:
        _say("finetuning alone")
        return self.share("finetune-only", 0.0).finetune_tokens_per_s

    def _share_with_another(self, policy: str, rate: float) -> Run:
        """A second engine trains: on the same cores, or each has half of them."""
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        serving_cores, training_cores = (cores, cores) if policy == "spatial" else (cores[:half], cores[half:] or cores)
        with on_cores(training_cores):
            training = self._another(len(training_cores))
            start_jobs(training, self._finetuning)
            self._warm_up(training)
        with on_cores(serving_cores):
            serving = self._engine if policy == "spatial" else self._another(len(serving_cores))
            serving.set_policy("inference-only")
            return self._drive(serving, rate, Neighbour(training, training_cores))

    def _another(self, threads: int) -> flexcore.Engine:
        if self._load is None:
            raise flexcore.InvalidArgument(f"policies: {', '.join(TWO_ENGINES)} need a second engine")
        engine = self._load(threads)
        engine.set_slo(self._slo)
        return engine

    def _warm_up(self, engine: flexcore.Engine) -> None:
        drive(engine, [], [], min(2.0, self._traffic.seconds / 4))

    def _drive(
        self,
        engine: flexcore.Engine,
        rate: float,
        training: Neighbour | None = None,
    ) -> Run:
        arrivals = self._traffic.arrivals(rate, self._most_tokens)
        return drive(engine, arrivals, self._prompts(arrivals), self._traffic.seconds, training)

    def _prompts(self, arrivals: Sequence[Arrival]) -> list[list[int]]:
        source = random.Random(self._traffic.seed)
        vocab = self._engine.model().vocab_size
        if self._texts is None:
            return [_measure.random_ids(a.prompt_tokens, vocab, source.randrange(1 << 30)) for a in arrivals]
        prompts = []
        for arrival in arrivals:
            ids: list[int] = []
            while len(ids) < arrival.prompt_tokens:
                ids += source.choice(self._texts)
            prompts.append(ids[: arrival.prompt_tokens])
        return prompts

    def _record(self, policy: str, rate: float, run: Run, alone: float) -> dict[str, Any]:
        predicted = [(step.predicted_ms, step.elapsed_ms) for step in run.steps if step.predicted_ms > 0]
        overruns = sum(elapsed > 1.1 * expected for expected, elapsed in predicted)
        return {
            "policy": policy,
            "requests_per_s": rate,
            **summary(run.visits, run.seconds, self._slo),
            "finetune_forward_tokens_per_s": run.finetune_forward_tokens_per_s,
            "finetune_tokens_per_s": run.finetune_tokens_per_s,
            "trained_tokens_per_s": run.trained_tokens_per_s,
            "finetuning_kept": run.finetune_tokens_per_s / alone if alone else 0.0,
            "busy_share": run.busy_share,
            "steps": len(run.steps),
            "overrun_share": overruns / len(predicted) if predicted else 0.0,
            "series": _series(run),
        }


def _series(run: Run) -> dict[str, list[float]]:
    """Column by column, rounded: what the figures need."""
    names = ("end", "elapsed_ms", "predicted_ms", "decode_tokens", "prefill_tokens", "finetune_tokens")
    return {name: [round(getattr(step, name), 3) for step in run.steps] for name in names}


def _compare_with_light_load(runs: list[dict[str, Any]]) -> None:
    light: dict[str, float] = {}
    for record in runs:
        reference = light.setdefault(record["policy"], record["finetune_tokens_per_s"])
        record["finetuning_kept_of_light_load"] = record["finetune_tokens_per_s"] / reference if reference else 0.0


def _texts(path: Path, engine: flexcore.Engine) -> list[list[int]]:
    tokenizer = Tokenizer(engine.model_directory)
    rows = [row.value for row in read_rows(path)]
    found = [row.get("prompt") or row.get("text") or (row.get("turns") or [""])[0] for row in rows]
    texts = [tokenizer.encode(text) for text in found if text]
    if not texts:
        raise flexcore.InvalidArgument(f"--prompts: {path} has no row with prompt, text or turns")
    return texts


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
