"""flexcore demo: chats are answered while an adapter learns to describe Python functions, in the same iterations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flexcore import FinetuneConfig, LoraConfig
from flexcore.demo import stdlib
from flexcore.demo.prompts import PROMPTS
from flexcore.demo.report import HeldOut, show, summarize
from flexcore.demo.session import ADAPTER, Session
from flexcore.demo.traffic import arrivals
from flexcore.demo.view import View
from flexcore.llm import LLM

_HELD_OUT = 16
_ADAPTER_EVERY = 4  # every fourth request asks the adapter that is being trained


@dataclass
class Options:
    duration: float = 60.0  # seconds
    request_rate: float = 0.7  # a second
    rows: int = 800
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    json: str | None = "demo.json"


def run(llm: LLM, options: Options, lora: LoraConfig, console: Console) -> dict[str, Any]:
    """Runs the demo on a loaded model; returns (and writes) what its table shows."""
    with _status(console, "reading docstrings of Python's standard library"):
        rows = stdlib.rows(options.rows + _HELD_OUT, options.seed)
        held_out = HeldOut(rows[:_HELD_OUT])
        dataset = llm.load_dataset(rows[_HELD_OUT:], max_length=256)
    with _status(console, "asking the model before it learns"):
        held_out.measure("before", llm, None)
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
            session.run(options.duration, _visitors(options, held_out), view.update)
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


def _visitors(options: Options, held_out: HeldOut) -> Iterator[tuple[float, list[dict[str, Any]], str | None]]:
    functions = itertools.cycle(held_out.rows)
    for index, (when, prompt) in enumerate(arrivals(options.request_rate, PROMPTS, options.seed)):
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
