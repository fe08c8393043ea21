"""Everything at once in a pool that is too small: a request has its tokens and a job its losses, whatever others do."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import MakeEngine, clear, least_pool
from running import Log, generate, is_idle, random_examples, random_tokens, run

import flexcore as fc

STEPS = 150
PREFIX = random_tokens(30, seed=1)
PROMPTS = [PREFIX[:cut] + random_tokens(extra, seed=cut) for cut, extra in ((0, 3), (8, 1), (16, 9), (30, 2), (30, 21))]
SERVED = ["x", "y"]  # adapters that never change
PAGE = 2 * 3 * 2 * 16 * 4 * 4  # bytes: keys and values of 3 layers, 2 heads of 16, 4 tokens, float32
POLICIES = ["hybrid", "temporal:2", "dynamic-temporal", "token-cap:8", "inference-only", "finetune-only"]
METHODS: list[Any] = [  # of jobs
    fc.LoraConfig(r=3, lora_alpha=6),
    fc.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3),
    fc.LoraConfig(r=3, use_dora=True, lora_dropout=0.2),
    fc.IA3Config(),
    fc.BottleneckConfig(5, "gelu"),
    fc.PrefixTuningConfig(3),
]
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 2, "num_epochs": 2}


class Walk:
    """One engine and what it should say."""

    def __init__(self, engine: fc.Engine, reference: fc.Engine, directories: dict[str, Path], seed: int) -> None:
        self.engine, self.reference, self.directories = engine, reference, directories
        self.rng = np.random.default_rng(seed)
        self.log = Log()
        self.requests: dict[int, tuple[list[int], fc.SamplingParams, str | None]] = {}
        self.cancelled: set[int] = set()
        self.jobs: dict[int, tuple[int, fc.FinetuneConfig]] = {}
        self.acts: dict[Callable[[], None], float] = {  # chances
            self.step: 10.0,
            self.submit: 2.0,
            self.cancel: 0.4,
            self.load_or_unload: 0.5,
            self.train: 0.5,
            self.change_job: 0.3,
            self.measure: 0.3,
        }

    def go(self, num_acts: int) -> None:
        acts, weights = list(self.acts), np.array(list(self.acts.values()))
        for choice in self.rng.choice(len(acts), num_acts, p=weights / weights.sum()):
            acts[choice]()

    def step(self) -> None:
        self.log.take(self.engine.step())

    def submit(self) -> None:
        names = [None, *(a.name for a in self.engine.adapters() if a.name in SERVED)]
        prompt = PROMPTS[self.rng.integers(len(PROMPTS))]
        sampling = fc.SamplingParams(
            max_tokens=int(self.rng.integers(1, 40)),
            temperature=float(self.rng.integers(2)),
            seed=int(self.rng.integers(1000)),
            ignore_eos=True,
        )
        name = names[self.rng.integers(len(names))]
        self.requests[self.engine.submit(prompt, sampling, name)] = (prompt, sampling, name)

    def cancel(self) -> None:
        request = int(self.rng.choice(list(self.requests))) if self.requests else 1
        if self.engine.cancel(request):
            self.cancelled.add(request)

    def load_or_unload(self) -> None:
        name = SERVED[self.rng.integers(len(SERVED))]
        if any(adapter.name == name for adapter in self.engine.adapters()):
            self.engine.unload_adapter(name)
        else:
            self.engine.load_adapter(name, self.directories[name])

    def train(self) -> None:
        seed = int(self.rng.integers(10))
        window = int(self.rng.integers(1, 20))
        config = fc.FinetuneConfig(seed=seed, window_tokens=window, backward_window_tokens=window + 3, **SGD)
        if sum(job.status in ("queued", "running", "paused") for job in self.engine.jobs()) < 3:
            name = f"job {len(self.jobs)}"
            self.engine.create_adapter(name, METHODS[seed % len(METHODS)], seed=seed)
            self.jobs[self.engine.finetune(name, examples_of(seed), config)] = (seed, config)

    def change_job(self) -> None:
        for job in self.engine.jobs():
            if job.status == "paused":
                self.engine.resume_job(job.id)
            elif job.status == "running":
                act = self.rng.integers(5)
                if act == 0:
                    self.engine.cancel_job(job.id)
                elif act < 3:
                    self.engine.pause_job(job.id)

    def measure(self) -> None:
        """Needs pages of its own, which may be taken."""
        try:
            scores = self.engine.score(PREFIX)
            result = self.engine.loss_and_gradients("fixed", examples_of(1)[:1], 5, 7)
        except fc.OutOfMemory:
            return
        assert scores == pytest.approx(self.reference.score(PREFIX), abs=1e-4)
        assert result["loss"] == pytest.approx(self.reference.loss_and_gradients("fixed", examples_of(1)[:1])["loss"])

    def change_sharing(self) -> None:
        self.engine.set_slo(fc.SLO(tpot_ms=float(self.rng.choice([0.3, 3.0, 1e6])), ttft_ms=50.0))
        self.engine.set_policy(POLICIES[self.rng.integers(len(POLICIES))])

    def finish(self) -> None:
        self.engine.set_policy("hybrid")
        for job in self.engine.jobs():
            if job.status == "paused":
                self.engine.resume_job(job.id)
        run(self.engine, log=self.log)

    def check_requests(self) -> None:
        for request, (prompt, sampling, name) in self.requests.items():
            wanted = generate(self.reference, [prompt], sampling, name)[0]
            if request in self.cancelled:
                assert self.log.finished(request) == "cancelled"
                assert self.log.tokens(request) == wanted[: len(self.log.tokens(request))]
            else:
                assert self.log.finished(request) == "length"
                assert self.log.tokens(request) == wanted

    def check_jobs(self) -> None:
        for job, (seed, config) in self.jobs.items():
            self.reference.create_adapter("again", METHODS[seed % len(METHODS)], seed=seed)
            again = self.reference.finetune("again", examples_of(seed), config)
            wanted = run(self.reference).losses(again)
            self.reference.unload_adapter("again")
            losses = self.log.losses(job)
            assert losses == pytest.approx(wanted[: len(losses)], rel=1e-4)
            info = self.engine.job(job)
            assert info.status == "cancelled" or (info.status == "succeeded" and len(losses) == len(wanted)), info.error


def examples_of(seed: int) -> list[fc.Example]:
    return random_examples((25, 4, 40, 11), seed=seed)


def small_pool(tiny_dir: Any, **changes: Any) -> int:
    """For the longest example, and next to nothing else."""
    return max(_least_pool(tiny_dir("mistral"), k, **changes) for k in range(len(METHODS)))


@functools.cache
def _least_pool(directory: Path, k: int, **changes: Any) -> int:
    return least_pool(directory, METHODS[k], 40, within=PAGE, block_size=4, **changes)


@pytest.fixture(scope="module")
def directories(tiny_hf: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in [*SERVED, "fixed"]}
    for seed, directory in enumerate(made.values()):
        oracle.peft_adapter(tiny_hf("mistral"), seed, scale=0.3).save_pretrained(directory)
    return made


@pytest.fixture(scope="module")
def reference(make_engine: MakeEngine, directories: dict[str, Path]) -> fc.Engine:
    engine = make_engine("mistral", enable_prefix_caching=False)
    for name, directory in directories.items():
        engine.load_adapter(name, directory)
    return engine


@pytest.mark.parametrize("seed", range(6))
def test_walk(
    seed: int, make_engine: MakeEngine, reference: fc.Engine, directories: dict[str, Path], tiny_dir: Any
) -> None:
    swap_space = seed % 2 * 3 * small_pool(tiny_dir)  # for activations, and for what is swapped out
    engine = make_engine(
        "mistral",
        kv_cache_memory_bytes=small_pool(tiny_dir, swap_space_bytes=swap_space) + 16 * seed * PAGE,
        swap_space_bytes=swap_space,
        block_size=4,
        max_num_seqs=4 + seed,
        max_num_batched_tokens=16 + 5 * seed,
        enable_prefix_caching=seed % 3 != 0,
    )
    engine.load_adapter("fixed", directories["fixed"])
    walk = Walk(engine, reference, directories, seed)
    walk.go(STEPS)
    walk.finish()
    assert is_idle(engine)
    walk.check_requests()
    walk.check_jobs()
    assert len(walk.requests) > 5 and walk.jobs
    clear(engine)
    assert engine.memory()["adapters"] == 0 and engine.adapters() == []


def resident_bytes() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what is free in pieces is no leak
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_soak(make_engine: MakeEngine, reference: fc.Engine, directories: dict[str, Path], tiny_dir: Any) -> None:
    """One engine for a long time (FLEXCORE_SOAK_SECONDS=600), objectives and policies changing too: the same answers
    and losses, and after each round the memory that it began with."""
    pool = small_pool(tiny_dir) + 30 * PAGE
    engine = make_engine("mistral", kv_cache_memory_bytes=pool, swap_space_bytes=2 * pool, block_size=4, max_num_seqs=6)
    # A GPU keeps the tables of the steps that it has recorded, and records new kinds of steps as they come.
    kept = () if engine.model().device == "cpu" else ("workspace",)

    def memory() -> dict[str, int]:
        return {tag: count for tag, count in engine.memory().items() if tag not in kept}

    for k, method in enumerate(METHODS):  # the workspace is that of the largest programs
        engine.create_adapter(f"{k}", method)
        engine.finetune(f"{k}", examples_of(0), fc.FinetuneConfig(**SGD))
    run(engine)
    clear(engine)
    empty = memory()
    end = time.monotonic() + float(os.environ.get("FLEXCORE_SOAK_SECONDS", "5"))
    rounds, requests, steps, jobs, resident = 0, 0, 0, 0, []
    while time.monotonic() < end or rounds < 2:
        engine.load_adapter("fixed", directories["fixed"])
        walk = Walk(engine, reference, directories, seed=1000 + rounds)
        walk.acts[walk.change_sharing] = 0.3
        walk.go(4 * STEPS)
        walk.finish()
        assert is_idle(engine)
        walk.check_requests()
        walk.check_jobs()
        clear(engine)
        assert memory() == empty
        rounds, requests, jobs = rounds + 1, requests + len(walk.requests), jobs + len(walk.jobs)
        steps += len(walk.log.reports)
        del walk
        gc.collect()
        resident.append(resident_bytes())
    some = [size >> 20 for size in resident[:: max(1, rounds // 8)]]
    print(f"{rounds} rounds, {steps} steps, {requests} requests, {jobs} jobs; resident MiB {some}")
    if rounds >= 20:  # what is left of a job is its line in Engine.jobs()
        assert resident[-1] < resident[rounds // 4] + (4 << 20)
