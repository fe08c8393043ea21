"""Ways of sharing one machine between requests and finetuning, driven with the same traffic."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import flexcore
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

    lora: flexcore.LoraConfig
    train_len: int = 512
    batch_size: int = 4
    jobs: int = 1


@dataclass
class Step:
    end: float  # seconds from the start
    elapsed_ms: float
    predicted_ms: float
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
