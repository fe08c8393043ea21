"""Chat requests that arrive at random, and what became of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flexcore import SLO
from flexcore.outputs import Answer
from flexcore.ui import percentile


@dataclass
class Visit:
    """One request, from its arrival on. Times are seconds on one clock."""

    messages: list[dict[str, Any]]
    adapter: str | None
    arrival: float
    version: int = 0  # of the adapter, when it was asked
    request: int = -1
    answer: Answer | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0

    @property
    def question(self) -> str:
        return str(self.messages[-1]["content"])

    @property
    def finished(self) -> bool:
        return self.answer is not None and self.answer.finished

    def note_token(self, now: float) -> None:
        self.tokens += 1
        if self.first_token is None:
            self.first_token = now
        self.last_token = now

    @property
    def ttft_ms(self) -> float | None:
        return None if self.first_token is None else 1000 * (self.first_token - self.arrival)

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of a token after the first."""
        if self.first_token is None or self.last_token is None or self.tokens < 2:
            return None
        return 1000 * (self.last_token - self.first_token) / (self.tokens - 1)


def arrivals(rate: float, prompts: tuple[str, ...], seed: int) -> Iterator[tuple[float, str]]:
    """Seconds from the start, and prompts, of a Poisson process of `rate` a second."""
    source = random.Random(seed)
    order = list(prompts)
    source.shuffle(order)
    now = 0.0
    for prompt in itertools.cycle(order):
        now += source.expovariate(rate)
        yield now, prompt


@dataclass
class Latencies:
    """Of the requests that got that far."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, visits: list[Visit]) -> Latencies:
        return cls(
            [visit.ttft_ms for visit in visits if visit.ttft_ms is not None],
            [visit.tpot_ms for visit in visits if visit.tpot_ms is not None],
        )

    def summary(self, slo: SLO) -> dict[str, dict[str, float | None]]:
        return {"ttft_ms": _summary(self.ttft_ms, slo.ttft_ms), "tpot_ms": _summary(self.tpot_ms, slo.tpot_ms)}


def _summary(values: list[float], objective: float) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "objective": objective, "within": None}
    within = sum(value <= objective for value in values) / len(values)
    return {
        "p50": round(percentile(values, 50), 2),
        "p99": round(percentile(values, 99), 2),
        "objective": objective,
        "within": round(within, 4),
    }
