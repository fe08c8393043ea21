"""The demo's loop: requests arrive, the engine steps, everything is counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flexcore import FinetuneConfig, SamplingParams, StepReport
from flexcore.adapters import AdapterConfig
from flexcore.datasets import Dataset
from flexcore.demo.traffic import Visit
from flexcore.llm import LLM

ADAPTER = "docstrings"
_RATE_WINDOW = 4.0  # seconds over which the view's rates are taken
_DRAIN = 15.0  # seconds that running requests get after the last arrival


@dataclass
class Counts:
    """A moment's totals."""

    time: float = 0.0
    served: int = 0
    trained: float = 0.0  # tokens that went forth and back


class Session:
    """Serves arriving chats while the adapter trains; `step` moves both on."""

    def __init__(self, llm: LLM, dataset: Dataset, lora: AdapterConfig, config: FinetuneConfig) -> None:
        self.llm = llm
        self.visits: list[Visit] = []
        self.losses: list[float] = []
        self.steps = 0
        self.version = 0
        self.last: StepReport | None = None
        self.now = Counts()
        self._history: deque[Counts] = deque([Counts()])
        self._by_request: dict[int, Visit] = {}
        self._sampling = SamplingParams(max_tokens=64, temperature=0.0)
        if ADAPTER not in {adapter.name for adapter in llm.engine.adapters()}:
            llm.engine.create_adapter(ADAPTER, lora, seed=0)
        self.job = llm.engine.finetune(ADAPTER, dataset.examples, config)
        self._start = time.perf_counter()

    def clock(self) -> float:
        return time.perf_counter() - self._start

    def running(self) -> list[Visit]:
        return [visit for visit in self.visits if not visit.finished]

    def arrive(self, messages: list[dict[str, Any]], adapter: str | None, arrival: float) -> None:
        visit = Visit(messages, adapter, arrival, self.version if adapter else 0)
        ids = self.llm.tokenizer.encode_chat(messages)
        ((visit.request, visit.answer),) = self.llm.submit(ids, self._sampling, adapter)
        self._by_request[visit.request] = visit
        self.visits.append(visit)

    def step(self) -> StepReport:
        report = self.last = self.llm.step()
        self.steps += 1
        self.now.time = self.clock()
        for event in report.outputs:
            if event.token_id >= 0 and event.request_id in self._by_request:
                self._by_request[event.request_id].note_token(self.now.time)
                self.now.served += 1
        for step in report.finetune:
            if step.target_tokens:
                self.losses.append(step.loss)
                self.version += 1
        self.now.trained += (report.num_finetune_forward_tokens + report.num_finetune_backward_tokens) / 2
        self._history.append(Counts(**vars(self.now)))
        while len(self._history) > 2 and self.now.time - self._history[0].time > _RATE_WINDOW:
            self._history.popleft()
        return report

    def rates(self) -> tuple[float, float]:
        """Tokens a second, served and trained, of the last seconds."""
        first, span = self._history[0], max(self.now.time - self._history[0].time, 1e-9)
        return (self.now.served - first.served) / span, (self.now.trained - first.trained) / span

    def training(self) -> bool:
        return self.llm.engine.job(self.job).status in ("queued", "running")

    def run(
        self,
        duration: float,
        visitors: Iterator[tuple[float, list[dict[str, Any]], str | None]],
        watch: Callable[[], None],
    ) -> None:
        """Until `duration` has passed and what arrived in it is answered; `watch` is called after each step."""
        arrival, messages, adapter = next(visitors)
        while (now := self.clock()) < duration + _DRAIN:
            while arrival <= min(now, duration):
                self.arrive(messages, adapter, arrival)
                arrival, messages, adapter = next(visitors)
            if now >= duration and not self.running():
                return
            if self.llm.engine.has_work():
                self.step()
            else:
                self.now.time = now
                time.sleep(min(0.01, max(0.0, arrival - now)))
            watch()

    def finish(self) -> None:
        """Ends the job (its last optimizer step stays published) and whatever still runs."""
        if self.training():
            self.llm.engine.cancel_job(self.job)
        for visit in self.running():
            self.llm.engine.cancel(visit.request)
        for _ in range(100):
            if not self.llm.engine.has_work():
                break
            self.llm.step()
