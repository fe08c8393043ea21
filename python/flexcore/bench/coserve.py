"""Finetuning kept while requests arrive, as a share of finetuning alone, and what the requests feel of it."""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

import flexcore
from flexcore.bench import _measure
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json
from flexcore.ui import percentile

LOADS = {"light": 0.2, "heavy": 0.7}  # of the requests that the engine serves when it does nothing else


@dataclass(frozen=True)
class Traffic:
    """Requests that arrive as a Poisson process."""

    seconds: float = 12.0
    input_len: tuple[int, int] = (32, 128)
    output_len: int = 32
    train_len: int = 512


@dataclass
class _Request:
    arrival: float
    times: list[float] = field(default_factory=list)  # of its tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Traffic()
    options.add_model(parser)
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of each load (default: %(default)s)")
    parser.add_argument("--input-len", type=int, nargs=2, default=defaults.input_len, metavar=("LOW", "HIGH"))
    parser.add_argument("--output-len", type=int, default=defaults.output_len, metavar="TOKENS")
    parser.add_argument("--train-len", type=int, default=defaults.train_len, metavar="TOKENS")
    options.add_lora(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    engine = _measure.load_engine(args)
    traffic = Traffic(args.seconds, tuple(args.input_len), args.output_len, args.train_len)
    result = measure(engine, options.lora_config(args), traffic)
    write_json(args.json, {"machine": _measure.machine(engine), **result})
    if args.json != "-":
        out.print(_table(result))
    return 0


def measure(engine: flexcore.Engine, lora: flexcore.LoraConfig, traffic: Traffic) -> dict[str, Any]:
    """Finetuning alone, then each load without and with finetuning."""
    _say("capacity")
    capacity = _capacity(engine, traffic)
    loads: list[dict[str, Any]] = []
    for name, share in LOADS.items():
        _say(f"{name} load, serving alone")
        loads.append({"load": name, "requests_per_s": share * capacity})
        loads[-1]["serving_alone"] = _serve(engine, share * capacity, traffic)
    _say("finetuning alone")
    job = _start_job(engine, lora, traffic)
    _serve(engine, 0.0, Traffic(seconds=traffic.seconds / 4))
    alone = _serve(engine, 0.0, traffic)["trained_tokens_per_s"]
    for load in loads:
        _say(f"{load['load']} load and finetuning")
        both = _serve(engine, load["requests_per_s"], traffic)
        load["coserving"] = both
        load["finetuning_kept"] = both["trained_tokens_per_s"] / alone
    engine.cancel_job(job)
    engine.unload_adapter("coserve")
    return {"capacity_requests_per_s": capacity, "finetune_alone_tokens_per_s": alone, "loads": loads}


def _say(what: str) -> None:
    if err.is_terminal:
        err.print(f"{what} ...", style="dim")


def _prompt(engine: flexcore.Engine, traffic: Traffic, source: random.Random) -> list[int]:
    length = source.randint(*traffic.input_len)
    return _measure.random_ids(length, engine.model().vocab_size, source.randrange(1 << 30))


def _capacity(engine: flexcore.Engine, traffic: Traffic, count: int = 32) -> float:
    """Requests per second, all waiting from the start; a first few warm up."""
    source = random.Random(1)
    for number in (4, count):
        prompts = [_prompt(engine, traffic, source) for _ in range(number)]
        start = time.perf_counter()
        engine.submit_batch(prompts, _measure.greedy(traffic.output_len))
        while engine.has_work():
            engine.step()
    return count / (time.perf_counter() - start)


def _start_job(engine: flexcore.Engine, lora: flexcore.LoraConfig, traffic: Traffic) -> int:
    engine.create_adapter("coserve", lora)
    vocab = engine.model().vocab_size
    rows = [_measure.random_ids(traffic.train_len, vocab, 10_000 + k) for k in range(32)]
    examples = [flexcore.Example(ids, ids) for ids in rows]
    return engine.finetune("coserve", examples, flexcore.FinetuneConfig(batch_size=4, num_epochs=1000))


def _serve(engine: flexcore.Engine, rate: float, traffic: Traffic) -> dict[str, float]:
    """Requests at `rate` per second for the traffic's time, then until the last one is done, which is not counted as
    training time."""
    source = random.Random(2)
    arrivals: list[float] = []
    at = source.expovariate(rate) if rate else traffic.seconds
    while at < traffic.seconds:
        arrivals.append(at)
        at += source.expovariate(rate)
    if rate and not arrivals:
        arrivals = [0.0]  # a load is one request at least
    prompts = [_prompt(engine, traffic, source) for _ in arrivals]
    requests: dict[int, _Request] = {}
    done: list[_Request] = []
    steps, sent, end = 0, 0, 0.0
    before, trained = _measure.trained_tokens(engine), None
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < traffic.seconds or requests or sent < len(arrivals):
        while sent < len(arrivals) and arrivals[sent] <= now:
            request = engine.submit(prompts[sent], _measure.greedy(traffic.output_len))
            requests[request] = _Request(arrivals[sent])
            sent += 1
        if not engine.has_work():
            time.sleep(max(min(arrivals[sent : sent + 1] or [traffic.seconds]) - now, 1e-4))
            continue
        report = engine.step()
        end = time.perf_counter() - start
        steps += 1
        if trained is None and end >= traffic.seconds:
            trained = (_measure.trained_tokens(engine) - before) / end
        for event in report.outputs:
            if event.request_id in requests:
                requests[event.request_id].times.append(end)
                if event.finish_reason is not None:
                    done.append(requests.pop(event.request_id))
    if trained is None:
        trained = (_measure.trained_tokens(engine) - before) / max(end, traffic.seconds)
    return {
        "requests": len(done),
        "steps": steps,
        "trained_tokens_per_s": trained,
        "served_tokens_per_s": sum(len(request.times) for request in done) / max(end, traffic.seconds),
        **_latencies(done),
    }


def _latencies(done: list[_Request]) -> dict[str, float]:
    if not done:
        return {}
    tpot = [1000 * (r.times[-1] - r.times[0]) / (len(r.times) - 1) for r in done if len(r.times) > 1]
    ttft = [1000 * (r.times[0] - r.arrival) for r in done]
    names = ((50, "p50"), (99, "p99"))
    return {f"tpot_ms_{name}": percentile(tpot, q) for q, name in names} | {
        f"ttft_ms_{name}": percentile(ttft, q) for q, name in names
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        "load", "requests/s", "finetuning kept", "trained tok/s", "TPOT ms p50 / p99", "TPOT ms serving alone"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("none", "", "100%", f"{result['finetune_alone_tokens_per_s']:,.0f}", "", "")
    for load in result["loads"]:
        both, alone = load["coserving"], load["serving_alone"]
        table.add_row(
            load["load"],
            f"{load['requests_per_s']:.1f}",
            f"{load['finetuning_kept']:.0%}",
            f"{both['trained_tokens_per_s']:,.0f}",
            _tpot(both),
            _tpot(alone),
        )
    return table


def _tpot(served: dict[str, float]) -> str:
    return f"{served['tpot_ms_p50']:.1f} / {served['tpot_ms_p99']:.1f}" if "tpot_ms_p50" in served else ""
