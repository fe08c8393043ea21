"""Ways of sharing one machine between requests and finetuning, driven with the same traffic."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import flexcore
from flexcore.adapters import AdapterConfig
from flexcore.bench import _measure
from flexcore.bench._client import Visit
from flexcore.bench._traces import Arrival

# Policies of one engine; and two engines, which share the cores or have half of them each.
ONE_ENGINE = ("hybrid", "temporal:64", "temporal:128", "temporal:512", "dynamic-temporal", "token-cap:256")
TWO_ENGINES = ("spatial", "separate")
ALL = (*ONE_ENGINE, *TWO_ENGINES)


@dataclass(frozen=True)
class Finetuning:
    """What trains: jobs that never end, over random tokens."""

    lora: AdapterConfig
    train_len: int = 512
    batch_size: int = 4
    jobs: int = 1


@dataclass
class Step:
    end: float  # seconds from the start
    elapsed_ms: float
    predicted_ms: float
    predicted_upper_ms: float  # with the margin
    decode_tokens: int
    prefill_tokens: int
    finetune_tokens: float  # each half of a token's way counts half; of the backward, whole tokens


@dataclass
class Run:
    """One load under one policy. Finetuning is counted until `seconds`; requests are served to their end."""

    seconds: float
    visits: list[Visit] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finetune_forward_tokens_per_s: float = 0.0
    finetune_tokens_per_s: float = 0.0  # each half of a token's way, forth and back, counts half
    trained_tokens_per_s: float = 0.0  # of optimizer steps that were taken
    busy_share: float = 0.0  # of the time until `seconds`, taken by steps that serve

    def reactions(self) -> list[tuple[float, int]]:
        """Of every request that came when nobody was served: seconds until a step serves it, and how many steps that do
        not began in between."""
        found = []
        serves = [step.decode_tokens + step.prefill_tokens > 0 for step in self.steps]
        begins = [step.end - step.elapsed_ms / 1000 for step in self.steps]
        index = 0
        for visit in self.visits:
            while index < len(begins) and begins[index] < visit.arrival:
                index += 1
            if index > 0 and serves[index - 1]:
                continue
            answer = next((k for k in range(index, len(begins)) if serves[k]), None)
            if answer is not None:
                found.append((begins[answer] - visit.arrival, answer - index))
        return found


class Place(Protocol):
    """Where a load runs: engines on this machine, or a virtual clock."""

    max_tokens: int  # of a sequence

    def check(self, policy: str) -> None:
        """Raises InvalidArgument for a policy that it does not know."""

    def describe(self) -> dict[str, Any]:
        """In the keys of _measure.machine()."""

    def run(self, policy: str, arrivals: Sequence[Arrival], seconds: float) -> Run:
        """Jobs train meanwhile, unless the policy is inference-only."""


@dataclass(frozen=True)
class Neighbour:
    """An engine that trains beside the one that serves, on these cores."""

    engine: flexcore.Engine
    cores: Sequence[int]


@dataclass
class Progress:
    forward: float
    halves: float
    trained: float

    @classmethod
    def of(cls, engine: flexcore.Engine) -> Progress:
        forward = engine.stats().get("finetune_forward_tokens", 0.0)
        return cls(forward, _measure.trained_tokens(engine), float(sum(job.trained_tokens for job in engine.jobs())))


class Engines:
    """This machine. The policies of one engine share `engine`; those of two load others, with so many threads. Prompts
    are cut from `texts`, or random tokens."""

    def __init__(
        self,
        engine: flexcore.Engine,
        slo: flexcore.SLO,
        finetuning: Finetuning,
        load: Callable[[int], flexcore.Engine] | None = None,
        texts: Sequence[Sequence[int]] | None = None,
        seed: int = 1,
    ):
        self._engine, self._slo, self._finetuning = engine, slo, finetuning
        self._load, self._texts, self._seed = load, texts, seed
        self._engine.set_slo(slo)
        self.max_tokens = engine.model().max_model_len

    def check(self, policy: str) -> None:
        if policy not in TWO_ENGINES:
            self._engine.set_policy(policy)

    def describe(self) -> dict[str, Any]:
        return _measure.machine(self._engine)

    def run(self, policy: str, arrivals: Sequence[Arrival], seconds: float) -> Run:
        prompts = self._prompts(arrivals)
        if policy in TWO_ENGINES:
            return self._run_two(policy, arrivals, prompts, seconds)
        self._engine.set_policy(policy)
        jobs = [] if policy == "inference-only" else start_jobs(self._engine, self._finetuning)
        try:
            if jobs:
                _warm_up(self._engine, seconds)
            return drive(self._engine, arrivals, prompts, seconds)
        finally:
            stop_jobs(self._engine, jobs)

    def _run_two(
        self, policy: str, arrivals: Sequence[Arrival], prompts: Sequence[Sequence[int]], seconds: float
    ) -> Run:
        """A second engine trains: on the same cores, or each has half of them."""
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        serving_cores, training_cores = (cores, cores) if policy == "spatial" else (cores[:half], cores[half:] or cores)
        with on_cores(training_cores):
            training = self._another(len(training_cores))
            start_jobs(training, self._finetuning)
            _warm_up(training, seconds)
        with on_cores(serving_cores):
            serving = self._engine if policy == "spatial" else self._another(len(serving_cores))
            serving.set_policy("inference-only")
            return drive(serving, arrivals, prompts, seconds, Neighbour(training, training_cores))

    def _another(self, threads: int) -> flexcore.Engine:
        if self._load is None:
            raise flexcore.InvalidArgument(f"policies: {', '.join(TWO_ENGINES)} need a second engine")
        engine = self._load(threads)
        engine.set_slo(self._slo)
        return engine

    def _prompts(self, arrivals: Sequence[Arrival]) -> list[list[int]]:
        source = random.Random(self._seed)
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


def _warm_up(engine: flexcore.Engine, seconds: float) -> None:
    drive(engine, [], [], min(2.0, seconds / 4))


def start_jobs(engine: flexcore.Engine, finetuning: Finetuning) -> list[int]:
    jobs = []
    for number in range(finetuning.jobs):
        name = f"bench-{number}"
        engine.create_adapter(name, finetuning.lora)
        vocab = engine.model().vocab_size
        rows = [_measure.random_ids(finetuning.train_len, vocab, 10_000 + 64 * number + k) for k in range(32)]
        examples = [flexcore.Example(ids, ids) for ids in rows]
        config = flexcore.FinetuneConfig(batch_size=finetuning.batch_size, num_epochs=100_000)
        jobs.append(engine.finetune(name, examples, config))
    return jobs


def stop_jobs(engine: flexcore.Engine, jobs: Sequence[int]) -> None:
    for number, job in enumerate(jobs):
        engine.cancel_job(job)
        engine.unload_adapter(f"bench-{number}")


def drive(
    serving: flexcore.Engine,
    arrivals: Sequence[Arrival],
    prompts: Sequence[Sequence[int]],
    seconds: float,
    training: Neighbour | None = None,
) -> Run:
    """Sends the arrivals at their times to `serving`, whose jobs and, in a thread of its own, those of `training` go on
    meanwhile."""
    run = Run(seconds)
    tuned = training.engine if training else serving
    before = Progress.of(tuned)
    with _stepping(training):
        start = time.perf_counter()
        _serve(serving, arrivals, prompts, seconds, start, run, lambda: _count(run, before, tuned, start))
    return run


def _count(run: Run, before: Progress, engine: flexcore.Engine, start: float) -> None:
    now, seconds = Progress.of(engine), time.perf_counter() - start
    run.finetune_forward_tokens_per_s = (now.forward - before.forward) / seconds
    run.finetune_tokens_per_s = (now.halves - before.halves) / seconds
    run.trained_tokens_per_s = (now.trained - before.trained) / seconds


def _serve(
    engine: flexcore.Engine,
    arrivals: Sequence[Arrival],
    prompts: Sequence[Sequence[int]],
    seconds: float,
    start: float,
    run: Run,
    time_is_up: Callable[[], None],
) -> None:
    waiting: dict[int, Visit] = {}
    sent, counted, serving_ms = 0, False, 0.0
    while True:
        now = time.perf_counter() - start
        if not counted and now >= seconds:
            counted = True
            run.busy_share = serving_ms / (1000 * now)
            time_is_up()
        while sent < len(arrivals) and arrivals[sent].at <= now:
            arrival = arrivals[sent]
            sampling = _measure.greedy(arrival.output_tokens)
            request = engine.submit(prompts[sent], sampling, waited_ms=1000 * (now - arrival.at))
            waiting[request] = Visit(arrival.at, arrival.prompt_tokens)
            run.visits.append(waiting[request])
            sent += 1
        if counted and sent == len(arrivals) and not waiting:
            return
        if not engine.has_work():
            until = arrivals[sent].at if sent < len(arrivals) else seconds
            time.sleep(min(max(until - now, 1e-4), 0.01))
            continue
        report = engine.step()
        end = time.perf_counter() - start
        if report.num_decode_tokens + report.num_prefill_tokens:
            serving_ms += report.elapsed_ms
        run.steps.append(
            Step(
                end,
                report.elapsed_ms,
                report.predicted_ms,
                report.predicted_upper_ms,
                report.num_decode_tokens,
                report.num_prefill_tokens,
                (report.num_finetune_forward_tokens + report.num_finetune_backward_tokens) / 2,
            )
        )
        for event in report.outputs:
            if event.request_id in waiting:
                waiting[event.request_id].times.append(end)
                if event.finish_reason is not None:
                    waiting.pop(event.request_id).done = True


@contextmanager
def _stepping(neighbour: Neighbour | None) -> Iterator[None]:
    if neighbour is None:
        yield
        return
    stop = threading.Event()

    def loop() -> None:
        with on_cores(neighbour.cores):
            while not stop.is_set():
                neighbour.engine.step()

    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(loop)
        try:
            yield
        finally:
            stop.set()
        stepping.result()  # raises what ended it


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Threads that are made meanwhile run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
