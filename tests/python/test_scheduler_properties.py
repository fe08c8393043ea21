"""The scheduler alone, in virtual time: whatever comes, no plan is above its limits, nothing starves, and all ends."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcore as fc

LAYERS = 3
COSTS = {
    "any_forward": 4.0,
    "decode_rows": 0.5,
    "prefill_tokens": 0.2,
    "sampled_rows": 0.1,
    "any_finetune": 3.0,
    "finetune_tokens": 0.2,
    "backward_layer_tokens": 0.15,
    "backward_units": 0.5,
}
POLICIES = (
    "hybrid",
    "hybrid",
    "hybrid",
    "temporal:3",
    "dynamic-temporal",
    "token-cap:24",
    "inference-only",
    "finetune-only",
)

requests_ = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90), st.integers(1, 12)), max_size=8)
jobs_ = st.lists(st.tuples(st.lists(st.integers(1, 90), min_size=1, max_size=3), st.integers(1, 3)), max_size=2)
SHAPES = {
    "max_num_seqs": (1, 2, 8),
    "max_num_batched_tokens": (1, 7, 32, 128),
    "block_size": (1, 4, 16),
    "spare_pages": (0, 1, 5, 40),  # beyond what the longest sequence needs
    "tpot_ms": (2.0, 15.0, 60.0),
    "ttft_ms": (30.0, 1000.0),
    "min_finetune_share": (0.0, 0.05, 0.3),
    "in_flight": (20, 150),
}
VARIANTS = 10  # engines that one example is tried on: drawing an example costs more than running it


def shapes(seed: int) -> list[tuple[str, dict[str, float]]]:
    source = random.Random(seed)
    return [
        (source.choice(POLICIES), {name: source.choice(values) for name, values in SHAPES.items()})
        for _ in range(VARIANTS)
    ]


def simulation(policy: str, requests, jobs, shape, seed: int) -> tuple[fc.SimulationConfig, fc.Simulation]:
    longest = max([p + o for _, p, o in requests] + [n for lengths, _ in jobs for n in lengths] + [1])
    config = fc.SimulationConfig(
        engine=fc.EngineConfig(
            max_num_seqs=shape["max_num_seqs"],
            max_num_batched_tokens=shape["max_num_batched_tokens"],
            block_size=shape["block_size"],
            slo=fc.SLO(shape["tpot_ms"], shape["ttft_ms"]),
            policy=policy,
            min_finetune_share=shape["min_finetune_share"],
            seed=seed,
        ),
        num_layers=LAYERS,
        num_blocks=-(-longest // shape["block_size"]) + shape["spare_pages"],
        max_finetune_tokens_in_flight=shape["in_flight"],
        step_time_ms=COSTS,
        noise=0.1,
        stall_share=0.02,
        stall_ms=30.0,
        duration_ms=300.0,
    )
    arrivals = sorted(requests)
    result = fc.simulate(
        [fc.SimulatedRequest(float(at), prompt, output) for at, prompt, output in arrivals],
        [fc.SimulatedJob(lengths, batch) for lengths, batch in jobs],
        config,
    )
    return config, result


@given(requests_, jobs_, st.integers(0, 1 << 30))
@settings(max_examples=1000, deadline=None, database=None, derandomize=True)
def test_whatever_comes(requests, jobs, seed) -> None:
    for policy, shape in shapes(seed):
        check(policy, requests, jobs, shape, seed)


def check(policy, requests, jobs, shape, seed) -> None:
    config, result = simulation(policy, requests, jobs, shape, seed)
    steps, engine = result.steps, config.engine

    rows = steps["decode_rows"] + steps["prefill_tokens"] + steps["finetune_tokens"]
    assert np.all(rows <= engine.max_num_batched_tokens)
    assert np.all(steps["running"] <= engine.max_num_seqs)
    finetunes = steps["finetune_tokens"] + steps["backward_layer_tokens"] > 0
    serves = steps["decode_rows"] + steps["prefill_tokens"] > 0
    # What finetuning makes longer stays within its budget, unless it is owed a piece or nothing else could run.
    over = steps["predicted_ms"] > steps["budget_ms"] * (1 + 1e-9)
    assert not np.any(finetunes & over & ~steps["floor"])
    if policy == "inference-only":
        assert not np.any(finetunes)

    assert result.blocks_free == config.num_blocks
    for (at, _, output), tokens in zip(sorted(requests), result.answers["token_ms"], strict=True):
        assert len(tokens) == output and tokens[0] > at and np.all(np.diff(tokens) > 0)
    assert np.all(serves | finetunes)  # no step does nothing


@given(requests_, jobs_, st.integers(0, 1 << 30))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_same_input_same_plan(requests, jobs, seed) -> None:
    policy, shape = shapes(seed)[0]
    first, second = (simulation(policy, requests, jobs, shape, seed)[1] for _ in range(2))
    assert first.end_ms == second.end_ms
    for name, values in first.steps.items():
        assert np.array_equal(values, second.steps[name]), name


@given(st.sampled_from((0.02, 0.1, 0.3)), st.integers(1, 90))
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
def test_finetuning_has_its_floor_when_objectives_leave_no_time(share: float, running: int) -> None:
    config = fc.SimulationConfig(
        engine=fc.EngineConfig(slo=fc.SLO(tpot_ms=1.0), min_finetune_share=share),
        num_layers=LAYERS,
        step_time_ms=COSTS,
        duration_ms=8000.0,
    )
    if running <= 60:
        requests = [fc.SimulatedRequest(0.0, 20, 5000)] * running
    else:  # more than there are slots for, from the start to the end
        requests = [fc.SimulatedRequest(0.0, 20, 60)] * (40 * running)
    result = fc.simulate(requests, [fc.SimulatedJob([200, 90], 4)], config)
    steps = {name: values[result.steps["begin_ms"] < config.duration_ms] for name, values in result.steps.items()}
    serving = (
        COSTS["any_forward"] * (steps["decode_rows"] + steps["prefill_tokens"] > 0)
        + (COSTS["decode_rows"] + COSTS["sampled_rows"]) * steps["decode_rows"]
        + COSTS["prefill_tokens"] * steps["prefill_tokens"]
    )
    tuned = steps["elapsed_ms"] - serving
    assert abs(tuned.sum() / steps["elapsed_ms"].sum() - share) < 0.01
