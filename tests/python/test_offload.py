"""Activations in host memory: where the device has too little, the same gradients, as a plan says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engines import EXACT, MakeEngine
from running import is_idle, random_examples, run
from test_recompute import LENGTH, LORA, budgets, planned

import flexcore as fc

ENOUGH = 10_000_000


def of(plan: fc.MemoryPlan, choice: str) -> set[str]:
    return {tensor.name for tensor in plan.tensors if tensor.choice == choice}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_the_same_gradients(name: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    engine = make_engine(name, max_num_seqs=1, swap_space_bytes=ENOUGH)
    engine.create_adapter("a", LORA)
    examples = random_examples((LENGTH, 23), seed=3)
    engine.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.05, batch_size=2))  # B is no longer zero
    run(engine)
    wanted = {split: engine.loss_and_gradients("a", examples, *split) for split in ((None, None), (9, 17), (33, 7))}
    choices = budgets(tiny_dir(name), LORA, LENGTH, swap_space_bytes=ENOUGH)
    assert len(choices) > 6 and choices[-1][1].saved_activations == 0
    assert of(choices[-1][1], "kept") == set() != of(choices[-1][1], "offloaded")
    for budget, _ in choices[:: max(1, len(choices) // 6)] + choices[-1:]:
        engine.set_finetune_memory(budget)
        for split, reference in wanted.items():
            got = engine.loss_and_gradients("a", examples, *split)
            for tensor, value in reference.items():
                if EXACT["device"] == "cpu":
                    assert np.array_equal(got[tensor], value), (budget, split, tensor)
                else:
                    np.testing.assert_allclose(got[tensor], value, rtol=1e-4, atol=1e-6)
    assert is_idle(engine)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_a_job_keeps_what_was_planned(activations: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    settings = fc.FinetuneConfig(num_epochs=2, batch_size=2)
    examples = random_examples((LENGTH,) * 4, seed=4)
    changes: dict[str, Any] = {"finetune_activations": activations, "swap_space_bytes": ENOUGH, "max_num_seqs": 1}
    choices = budgets(tiny_dir("llama"), LORA, LENGTH, **changes)
    losses = []
    for budget, _ in (choices[0], choices[len(choices) // 2], choices[-1]):
        plan = planned(tiny_dir("llama"), LORA, LENGTH, **changes, finetune_memory_bytes=budget)
        assert budget == choices[len(choices) // 2][0] or (plan.offloaded_activations > 0) == (budget < choices[0][0])
        engine = make_engine("llama", **changes, finetune_memory_bytes=budget)
        engine.create_adapter("a", LORA, seed=1)
        job = engine.finetune("a", examples, settings)
        losses.append(run(engine).losses(job))
        assert engine.job(job).status == "succeeded"
        peak = engine.memory_peak()
        for tag in ("saved_activations", "offloaded_activations", "gradients"):
            assert peak[tag] == getattr(plan, tag), tag
        whole = plan.swap_space + plan.offloaded_activations
        assert peak["swap_space"] == whole and engine.memory()["swap_space"] == whole
        assert engine.memory()["offloaded_activations"] == 0 and is_idle(engine)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_gradients_beside_a_job_that_has_the_host_memory(make_engine: MakeEngine, tiny_dir: Any) -> None:
    """They are recomputed then, and are the same."""
    examples = random_examples((LENGTH,), seed=6)
    budget = budgets(tiny_dir("llama"), LORA, LENGTH, max_num_seqs=4)[-1][0]
    needs = planned(tiny_dir("llama"), LORA, LENGTH, finetune_memory_bytes=budget, swap_space_bytes=ENOUGH)
    space = needs.offloaded_activations * 5 // 4
    engine = make_engine("llama", max_num_seqs=4, finetune_memory_bytes=budget, swap_space_bytes=space)
    for name in ("a", "b"):
        engine.create_adapter(name, LORA, seed=1)
    alone = engine.loss_and_gradients("b", examples)
    assert engine.memory_peak()["offloaded_activations"] > 0
    engine.finetune("a", examples, fc.FinetuneConfig(backward_window_tokens=8))
    run(engine, until=lambda log: engine.memory()["offloaded_activations"] > 0)
    held = engine.memory()["offloaded_activations"]
    beside = engine.loss_and_gradients("b", examples)
    assert engine.memory()["offloaded_activations"] == held and engine.memory_peak()["offloaded_activations"] == held
    for tensor, value in alone.items():
        np.testing.assert_allclose(beside[tensor], value, rtol=1e-4, atol=1e-6)
    run(engine)
    assert is_idle(engine)


def test_what_goes_to_host_memory_and_what_is_refused(tiny_dir: Any) -> None:
    directory = tiny_dir("llama")
    least = planned(directory, LORA, LENGTH, finetune_memory_bytes=budgets(directory, LORA, LENGTH)[-1][0])
    assert of(least, "offloaded") == set() and least.offloaded_activations == 0
    longest = planned(directory, LORA, 10, finetune_memory_bytes=50_000).max_sequence_length
    longer = planned(directory, LORA, 10, finetune_memory_bytes=50_000, swap_space_bytes=ENOUGH).max_sequence_length
    assert longer > 1.2 * longest
    # As much as the swap space has, and no more.
    for space in (8_000, 16_000, 32_000):
        plan = planned(directory, LORA, 10, finetune_memory_bytes=50_000, swap_space_bytes=space)
        assert longest <= plan.max_sequence_length <= longer
        most = planned(directory, LORA, plan.max_sequence_length, finetune_memory_bytes=50_000, swap_space_bytes=space)
        assert most.offloaded_activations + most.swap_space <= space and most.swap_space >= 0
        with pytest.raises(fc.InvalidArgument, match=f"at most {plan.max_sequence_length} tokens fit"):
            planned(directory, LORA, plan.max_sequence_length + 1, finetune_memory_bytes=50_000, swap_space_bytes=space)


def test_over_a_bus_only_what_nothing_makes_again(tiny_dir: Any) -> None:
    """A GPU's is slow: layers' inputs go, and the rest is recomputed."""
    changes: dict[str, Any] = {"swap_space_bytes": ENOUGH, "device": "cuda", "dtype": "bfloat16"}
    try:
        least = budgets(tiny_dir("llama"), LORA, LENGTH, **changes)[-1][1]
    except fc.DeviceError as error:
        pytest.skip(str(error))
    assert least.saved_activations == 0 and of(least, "kept") == set()
    assert of(least, "offloaded") == {"hidden"} and {"gate", "up", "attention"} <= of(least, "recomputed")
    assert "offloaded" in least.describe() and "host memory" in least.describe()
