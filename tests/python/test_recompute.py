"""Sequences that do not fit finetune_memory_bytes keep less and recompute: the same gradients, as a plan says."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import pytest
from engines import EXACT, MODELS, MakeEngine
from running import is_idle, random_examples, relative, run

import flexcore as fc

LORA = fc.LoraConfig(r=5, target_modules="all-linear")
LENGTH = 70


def planned(directory: Any, lora: fc.LoraConfig, length: int, **changes: Any) -> fc.MemoryPlan:
    return fc.plan(directory, fc.EngineConfig(**(EXACT | {"max_num_seqs": 1} | changes)), lora, length)


def in_flight(plan: fc.MemoryPlan, parameter_bytes: int) -> int:
    """What finetune_memory_bytes limits: gradients of the adapter are not in it."""
    return plan.saved_activations + plan.gradients - parameter_bytes


def budgets(directory: Any, lora: fc.LoraConfig, length: int, **changes: Any) -> list[tuple[int, fc.MemoryPlan]]:
    """Every amount that a sequence may keep, the largest first, and its plan."""
    found: list[tuple[int, fc.MemoryPlan]] = []
    bound: int | None = None
    while True:
        try:
            plan = planned(directory, lora, length, finetune_memory_bytes=bound, **changes)
        except fc.InvalidArgument as error:
            assert "tokens keep at least" in str(error)
            return found
        bytes = in_flight(plan, plan.optimizer // 2)
        assert bound is None or bytes <= bound
        found.append((bytes, plan))
        bound = bytes - 1


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name: str, targets: Any, make_engine: MakeEngine, tiny_dir: Any) -> None:
    lora = fc.LoraConfig(r=5, lora_alpha=9, target_modules=targets)
    engine = make_engine(name, max_num_seqs=1)
    engine.create_adapter("a", lora)
    examples = random_examples((LENGTH, 23), seed=3)
    engine.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.05, batch_size=2))  # B is no longer zero
    run(engine)
    wanted = {split: engine.loss_and_gradients("a", examples, *split) for split in ((None, None), (9, 17), (33, 7))}
    choices = budgets(tiny_dir(name), lora, LENGTH)
    assert len(choices) >= 2
    for budget, _ in choices[:: max(1, len(choices) // 6)] + choices[-1:]:
        engine.set_finetune_memory(budget)
        for split, reference in wanted.items():
            got = engine.loss_and_gradients("a", examples, *split)
            for tensor, value in reference.items():
                if EXACT["device"] == "cpu":  # a row's bits are the same wherever it is computed
                    assert np.array_equal(got[tensor], value), (budget, split, tensor)
                else:
                    np.testing.assert_allclose(got[tensor], value, rtol=1e-4, atol=1e-6)
    engine.set_finetune_memory(choices[-1][0] - 1)
    with pytest.raises(fc.InvalidArgument, match=r"finetune_memory_bytes \(\d+\); at most \d+ tokens fit"):
        engine.loss_and_gradients("a", examples)
    assert is_idle(engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_job_keeps_what_was_planned(name: str, dtype: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    examples, settings = random_examples((LENGTH,) * 3, seed=4), fc.FinetuneConfig(num_epochs=2, batch_size=1)
    losses = []
    choices = budgets(tiny_dir(name), LORA, LENGTH, dtype=dtype)
    for budget, plan in (choices[0], choices[len(choices) // 2], choices[-1]):
        engine = make_engine(name, dtype=dtype, max_num_seqs=1, finetune_memory_bytes=budget)
        engine.create_adapter("a", LORA, seed=1)
        job = engine.finetune("a", examples, settings)
        losses.append(run(engine).losses(job))
        assert engine.job(job).status == "succeeded"
        peak = engine.memory_peak()
        assert peak["saved_activations"] == plan.saved_activations
        assert peak["gradients"] == plan.gradients and peak["workspace"] <= plan.workspace
    assert choices[-1][1].saved_activations < choices[0][1].saved_activations / 2.5
    for other in losses[1:]:
        # A step's gradients differ by bfloat16's rounding, and AdamW takes signs of tiny ones for full steps.
        # The losses are 4e-3 off float32's themselves.
        assert other == pytest.approx(losses[0], rel=1e-5 if dtype == "float32" else 5e-3)


def test_the_budget_may_change_between_sequences(make_engine: MakeEngine, tiny_dir: Any) -> None:
    examples = random_examples((LENGTH, 30, 64, 12), seed=5)
    settings = fc.FinetuneConfig(num_epochs=3, batch_size=1, learning_rate=0.02)
    engine = make_engine("llama", max_num_seqs=1)
    engine.create_adapter("a", LORA, seed=1)
    job = engine.finetune("a", examples, settings)
    wanted = run(engine).losses(job)
    choices = [budget for budget, _ in budgets(tiny_dir("llama"), LORA, LENGTH)]
    engine.create_adapter("b", LORA, seed=1)
    job, got = engine.finetune("b", examples, settings), []
    while engine.job(job).status == "running":
        engine.set_finetune_memory([None, *choices][len(got) % (1 + len(choices))])
        got += [event.loss for event in engine.step().finetune if event.target_tokens]
    assert got == wanted
    engine.set_finetune_memory(choices[0])
    for bad in (0, -5):
        with pytest.raises(fc.InvalidArgument, match="finetune_memory_bytes"):
            engine.set_finetune_memory(bad)
    assert is_idle(engine)


def test_the_plan_says_what_is_recomputed_and_how_long_a_sequence_may_be(tiny_dir: Any) -> None:
    choices = budgets(tiny_dir("llama"), LORA, LENGTH)
    assert "recomputed" not in choices[0][1].describe()
    least = choices[-1][1]
    kept = {tensor.name for tensor in least.tensors if tensor.choice == "kept"}
    assert kept == {"hidden"} or len(kept) == 1
    recomputed = {tensor.name for tensor in least.tensors if tensor.choice == "recomputed"}
    assert {"gate", "up", "attention", "attention.lse", "q.rotated", "attention_residual"} <= recomputed
    # Each smaller one costs more: what it recomputes is no less.
    sizes = [budget for budget, _ in choices]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    with pytest.raises(fc.InvalidArgument) as error:
        planned(tiny_dir("llama"), LORA, LENGTH, finetune_memory_bytes=sizes[-1] // 2)
    longest = int(str(error.value).split("at most ")[1].split(" ")[0])
    assert 0 < longest < LENGTH
    planned(tiny_dir("llama"), LORA, longest, finetune_memory_bytes=sizes[-1] // 2)
    with pytest.raises(fc.InvalidArgument):
        planned(tiny_dir("llama"), LORA, longest + 2, finetune_memory_bytes=sizes[-1] // 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_activations_in_codes(name: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    """Half to a quarter of the memory, as planned; gradients near the exact ones, and the same in every split."""
    exact, coded = (make_engine(name, max_num_seqs=1, finetune_activations=kind) for kind in ("exact", "int8"))
    examples = random_examples((LENGTH, 23), seed=3)
    for engine in (exact, coded):
        engine.create_adapter("a", LORA, seed=1)
    exact.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.05, batch_size=2))  # B is no longer zero
    run(exact)
    with tempfile.TemporaryDirectory() as directory:
        exact.save_adapter("a", directory)
        coded.unload_adapter("a")
        coded.load_adapter("a", directory)
    wanted, got = exact.loss_and_gradients("a", examples), coded.loss_and_gradients("a", examples)
    assert got["loss"] == wanted["loss"]  # the forward is the same
    errors = [relative(got[key], wanted[key]) for key in wanted if key != "loss"]
    assert 1e-6 < max(errors) < 0.05, errors
    for split in ((9, 17), (1, None)):
        again = coded.loss_and_gradients("a", examples, *split)
        assert max(relative(again[key], got[key]) for key in got if key != "loss") < 2e-5
    plans = [planned(tiny_dir(name), LORA, LENGTH, finetune_activations=kind) for kind in ("exact", "int8")]
    assert plans[1].saved_activations < 0.4 * plans[0].saved_activations  # float32 otherwise
    both = sum(len(example.input_ids) for example in examples)  # at once
    assert coded.memory_peak()["saved_activations"] == plans[1].saved_activations // LENGTH * both
    choices = budgets(tiny_dir(name), LORA, LENGTH, finetune_activations="int8")
    coded.set_finetune_memory(choices[-1][0])
    least = coded.loss_and_gradients("a", examples, 9, 17)
    assert max(relative(least[key], wanted[key]) for key in got if key != "loss") < 0.05


def test_codes_are_an_option_by_name(tiny_dir: Any) -> None:
    with pytest.raises(fc.InvalidArgument, match='finetune_activations: "int4", wanted "exact" or "int8"'):
        fc.plan(tiny_dir("llama"), fc.EngineConfig(finetune_activations="int4"))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_without_rebuilding_and_without_pruning(name: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    """What is kept to compare with is kept indeed, and changes nothing."""
    examples = random_examples((LENGTH,), seed=3)
    kept, results = {}, {}
    for kind in ("all", "read", "exact"):
        engine = make_engine(name, max_num_seqs=1, finetune_activations=kind)
        engine.create_adapter("a", LORA, seed=1)
        engine.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.05))
        run(engine)
        plan = planned(tiny_dir(name), LORA, LENGTH, finetune_activations=kind)
        kept[kind] = engine.memory_peak()["saved_activations"]
        assert kept[kind] == plan.saved_activations
        results[kind] = engine.loss_and_gradients("a", examples, 9, 17)
        engine.create_adapter("prefix", fc.PrefixTuningConfig(3))
        engine.finetune("prefix", examples)
        run(engine)
    assert kept["all"] > kept["read"] > kept["exact"]
    for kind in ("all", "read"):
        assert (
            max(relative(results[kind][key], value) for key, value in results["exact"].items() if key != "loss") < 1e-6
        )
    with pytest.raises(fc.InvalidArgument, match='finetune_memory_bytes: 1000, wanted none with .*"all"'):
        planned(tiny_dir(name), LORA, LENGTH, finetune_activations="all", finetune_memory_bytes=1000)
