"""Driving an engine: steps until something ends, tokens by request, losses by job; random prompts and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import flexcore as fc

MAX_STEPS = 20000


@dataclass
class Log:
    """All events of a run."""

    events: dict[int, list[fc.TokenEvent]] = field(default_factory=dict)
    finetune: dict[int, list[fc.FinetuneEvent]] = field(default_factory=dict)
    reports: list[fc.StepReport] = field(default_factory=list)

    def take(self, report: fc.StepReport) -> fc.StepReport:
        self.reports.append(report)
        for token in report.outputs:
            self.events.setdefault(token.request_id, []).append(token)
        for event in report.finetune:
            self.finetune.setdefault(event.job_id, []).append(event)
        return report

    def tokens(self, request_id: int) -> list[int]:
        return [event.token_id for event in self.events.get(request_id, []) if event.token_id >= 0]

    def finished(self, request_id: int) -> str | None:
        events = self.events.get(request_id)
        return events[-1].finish_reason if events else None

    def losses(self, job_id: int) -> list[float]:
        return [event.loss for event in self.steps(job_id)]

    def steps(self, job_id: int) -> list[fc.FinetuneEvent]:
        """Events of optimizer steps, those of a mere change of status left out."""
        return [event for event in self.finetune.get(job_id, []) if event.target_tokens > 0]


def run(engine: fc.Engine, until: Callable[[Log], bool] | None = None, log: Log | None = None) -> Log:
    """Steps until `until`, or until there is no work."""
    log = Log() if log is None else log
    for _ in range(MAX_STEPS):
        if not engine.has_work() or (until is not None and until(log)):
            return log
        log.take(engine.step())
    raise AssertionError(f"no end after {MAX_STEPS} steps; the last: {log.reports[-1].explain}")


def generate(
    engine: fc.Engine,
    prompts: Sequence[Sequence[int]],
    sampling: fc.SamplingParams | Sequence[fc.SamplingParams],
    adapter: str | Sequence[str | None] | None = None,
) -> list[list[int]]:
    """The tokens of all prompts, served in one batch."""
    params = list(sampling) if isinstance(sampling, Sequence) else sampling
    names = adapter if adapter is None or isinstance(adapter, str) else list(adapter)
    ids = engine.submit_batch([list(prompt) for prompt in prompts], params, names)
    log = run(engine)
    return [log.tokens(request_id) for request_id in ids]


def greedy(max_tokens: int = 16, **more: Any) -> fc.SamplingParams:
    return fc.SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | more))


def random_tokens(length: int, seed: int, vocab_size: int = 160) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab_size, length).tolist()


def random_examples(lengths: Sequence[int], seed: int, masked: bool = True) -> list[fc.Example]:
    """Examples of these lengths; with `masked`, a random share of the front is a prompt, and later targets miss too."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, length in enumerate(lengths):
        tokens = random_tokens(length, seed * 1000 + i)
        labels = np.array(tokens)
        if masked:
            labels[: rng.integers(0, length - 1)] = -100
            labels[rng.random(length) < 0.1] = -100
            labels[-1] = tokens[-1]
        examples.append(fc.Example(tokens, labels.tolist()))
    return examples


def relative(value: np.ndarray, wanted: np.ndarray) -> float:
    """|value - wanted| / |wanted|, Euclidean norms over all elements."""
    value, wanted = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
    assert value.shape == wanted.shape, (value.shape, wanted.shape)
    assert np.isfinite(value).all()
    return float(np.linalg.norm(value - wanted) / max(np.linalg.norm(wanted), 1e-30))


def is_idle(engine: fc.Engine) -> bool:
    """Nothing is held but weights, pages, adapters and workspace, and every page is free."""
    stats, memory = engine.stats(), engine.memory()
    held = {
        name: memory[name]
        for name in ("saved_activations", "offloaded_activations", "gradients", "optimizer")
        if memory[name]
    }
    assert not held, held
    assert stats["kv_blocks_free"] == stats["kv_blocks"] and stats["swap_blocks_free"] == stats["swap_blocks"]
    assert stats["requests_running"] == stats["requests_waiting"] == 0
    return True
