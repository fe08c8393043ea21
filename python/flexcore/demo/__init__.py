"""flexcore demo: chats are answered while an adapter learns to describe Python functions, in the same iterations."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flexcore import SLO, FinetuneConfig, SamplingParams
from flexcore.adapters import AdapterConfig
from flexcore.demo import stdlib
from flexcore.demo.prompts import PROMPTS
from flexcore.demo.report import HeldOut, show, summarize
from flexcore.demo.session import ADAPTER, Session
from flexcore.demo.traffic import arrivals
from flexcore.demo.view import View
from flexcore.llm import LLM
from flexcore.ui import percentile

_HELD_OUT = 16
_TYPICAL_LOAD = 4  # requests at once
_TYPICAL_ANSWER = 50  # tokens
_MAX_RATE = 0.7  # requests a second: more scroll by faster than anybody reads
_HEADROOM = 3.0  # objective over the step time of serving alone
_ADAPTER_EVERY = 4  # every fourth request asks the adapter that is being trained


@dataclass
class Options:
    duration: float = 60.0  # seconds
    request_rate: float | None = None  # a second; None: what this machine serves with time to spare, at most 0.7
    rows: int = 800
    batch_size: int = 4
    learning_rate: float = 1e-3
    fixed_objective: bool = False  # otherwise a slow machine gets one that it can hold
    seed: int = 0
    json: str | None = "demo.json"


def run(llm: LLM, options: Options, lora: AdapterConfig, console: Console) -> dict[str, Any]:
    """Runs the demo on a loaded model; returns (and writes) what its table shows."""
    with _status(console, "reading docstrings of Python's standard library"):
        rows = stdlib.rows(options.rows + _HELD_OUT, options.seed)
        held_out = HeldOut(rows[:_HELD_OUT])
        dataset = llm.load_dataset(rows[_HELD_OUT:], max_length=256)
    with _status(console, "asking the model before it learns"):
        held_out.measure("before", llm, None)
    step_ms = _serving_step_ms(llm)
    if not options.fixed_objective:
        _fit_objective(llm, step_ms, console)
    rate = options.request_rate if options.request_rate is not None else _fitting_rate(step_ms)
    config = FinetuneConfig(
        num_epochs=100,  # more than the demo lasts
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    session = Session(llm, dataset, lora, config)
    view = View(console, session, options.duration)
    interrupted = False
    try:
        with view:
            session.run(options.duration, _visitors(rate, options.seed, held_out), view.update)
    except KeyboardInterrupt:
        interrupted = True
    losses = list(session.losses)
    session.finish()
    if losses and not interrupted:
        with _status(console, "asking the adapter after it learned"):
            held_out.measure("after", llm, ADAPTER)
    result = summarize(session, held_out, losses)
    console.print()
    show(console, result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"the same as JSON: {options.json}", style="dim", markup=False)
    return result


def _serving_step_ms(llm: LLM) -> float:
    """Median time of a step that serves a typical load and nothing else."""
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:_TYPICAL_LOAD]]
    for prompt in prompts:
        llm.submit(prompt, sampling)
    spans = []
    while llm.engine.has_work():
        start = time.perf_counter()
        if llm.step().num_decode_tokens == len(prompts):
            spans.append(1000 * (time.perf_counter() - start))
    return percentile(spans, 50)


def _fit_objective(llm: LLM, step_ms: float, console: Console) -> None:
    """Where serving alone nears the objective, nothing would be left to finetune with: a wider one replaces it."""
    needed = _HEADROOM * step_ms
    if needed > llm.slo.tpot_ms:
        llm.slo = SLO(tpot_ms=math.ceil(needed / 50) * 50.0, ttft_ms=llm.slo.ttft_ms)
        llm.engine.set_slo(llm.slo)
        console.print(
            f"this machine is slow or busy: the objective is {llm.slo.tpot_ms:.0f} ms a token", style="yellow"
        )


def _fitting_rate(step_ms: float) -> float:
    """Requests a second that keep a typical load busy for a third of the time."""
    return min(_MAX_RATE, 0.33 * _TYPICAL_LOAD * 1000 / (step_ms * _TYPICAL_ANSWER))


def _visitors(rate: float, seed: int, held_out: HeldOut) -> Iterator[tuple[float, list[dict[str, Any]], str | None]]:
    functions = itertools.cycle(held_out.rows)
    for index, (when, prompt) in enumerate(arrivals(rate, PROMPTS, seed)):
        if index % _ADAPTER_EVERY == _ADAPTER_EVERY - 1:
            yield when, next(functions)["messages"][:-1], ADAPTER
        else:
            yield when, [{"role": "user", "content": prompt}], None


class _status:
    """A spinner on a terminal, a line elsewhere."""

    def __init__(self, console: Console, text: str) -> None:
        self._status = console.status(text) if console.is_terminal else None
        if self._status is None:
            console.print(f"{text} ...", markup=False)

    def __enter__(self) -> None:
        if self._status:
            self._status.start()

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()
