"""Gradients against PEFT and torch autograd, and the law of windows: no split of the work changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import MODELS, MakeEngine
from running import greedy, is_idle, random_examples, random_tokens, relative, run

import flexcore as fc

TOLERANCE = 1e-4  # of each tensor against autograd, norm-wise
SPLIT_TOLERANCE = 2e-5  # of each tensor between two splits
TARGETS: dict[str, Any] = {
    "all-linear": "all-linear",
    "q+v": ["q_proj", "v_proj"],
    "down": ["down_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
LENGTHS = (37, 2, 70, 11, 23)  # together more rows than one pass holds


def assert_close(value: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> None:
    assert set(value) == set(wanted)
    assert value["loss"] == pytest.approx(wanted["loss"], rel=tolerance)
    errors = {name: relative(value[name], array) for name, array in wanted.items() if name != "loss"}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < tolerance, (worst, errors[worst])


def load(engine: fc.Engine, hf: Any, directory: Path, name: str, **config: Any) -> Any:
    """A random PEFT adapter, loaded in the engine as `name` too."""
    model = oracle.peft_adapter(hf, seed=len(name), **config)
    model.save_pretrained(directory / name)
    engine.load_adapter(name, directory / name)
    return model


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_against_autograd(name: str, targets: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine(name)
    model = load(engine, tiny_hf(name), tmp_path, "a", target_modules=TARGETS[targets])
    examples = random_examples(LENGTHS, seed=7)
    assert_close(engine.loss_and_gradients("a", examples), oracle.gradients(model, examples), TOLERANCE)
    assert is_idle(engine)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 1, "lora_alpha": 3},
        {"r": 13, "lora_alpha": 5, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 31}},
        {"r": 64, "target_modules": r".*layers\.2\..*(up|q)_proj"},
        {"r": 8, "target_modules": ["o_proj"], "layers_to_transform": None},
    ],
    ids=["rank-1", "rslora", "patterns", "top-layer-only", "o"],
)
def test_lora_options(config: dict[str, Any], shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine, examples = shared_engine("llama"), random_examples(LENGTHS, seed=8)
    model = load(engine, tiny_hf("llama"), tmp_path, "a", **config)
    assert_close(engine.loss_and_gradients("a", examples), oracle.gradients(model, examples), TOLERANCE)


def test_without_masks(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine("llama")
    model = load(engine, tiny_hf("llama"), tmp_path, "a")
    for examples in (random_examples((64,), 1, masked=False), random_examples((3, 2, 4), 2, masked=False)):
        assert_close(engine.loss_and_gradients("a", examples), oracle.gradients(model, examples), TOLERANCE)


def test_new_adapter(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """B is zero: A's gradient is zero, and the loss is the base model's."""
    engine, examples = shared_engine("llama"), random_examples((30, 12), seed=4)
    engine.create_adapter("a", fc.LoraConfig(r=4, lora_alpha=8), seed=3)
    engine.save_adapter("a", tmp_path)
    result = engine.loss_and_gradients("a", examples)
    wanted = oracle.gradients(oracle.load_peft(tiny_hf("llama"), tmp_path, trainable=True), examples)
    for name in wanted:
        if name.endswith("lora_A.weight"):
            assert not result[name].any()
        elif name != "loss":
            assert relative(result[name], wanted[name]) < TOLERANCE
    assert result["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen2_sliding", "qwen3"])
def whole(request: pytest.FixtureRequest, make_engine: MakeEngine, tiny_hf: Any, tmp_path_factory: Any) -> Any:
    """An engine that takes all examples in one pass, and its gradients: the split that is none."""
    engine = make_engine(request.param, max_num_batched_tokens=256)
    load(engine, tiny_hf(request.param), tmp_path_factory.mktemp("whole"), "a", r=6)
    examples = random_examples(LENGTHS, seed=9)
    result = engine.loss_and_gradients("a", examples)
    assert all(np.linalg.norm(value) > 0 for name, value in result.items() if name != "loss")
    return engine, examples, result


SPLITS = [(1, 1), (1, None), (None, 1), *np.random.default_rng(0).integers(2, 40, (8, 2)).tolist()]


@pytest.mark.parametrize("split", SPLITS)
def test_splits(split: tuple[int | None, int | None], whole: Any) -> None:
    engine, examples, wanted = whole
    forward, backward = split
    assert_close(engine.loss_and_gradients("a", examples, forward, backward), wanted, SPLIT_TOLERANCE)


def test_splits_of_each_alone(whole: Any) -> None:
    """The gradient of a batch is the sum of its examples', by targets; each in its own split."""
    engine, examples, wanted = whole
    counts = [sum(label != -100 for label in example.labels[1:]) for example in examples]
    total: dict[str, Any] = dict.fromkeys(wanted, 0.0)
    for i, (example, count) in enumerate(zip(examples, counts, strict=True)):
        part = engine.loss_and_gradients("a", [example], window_tokens=3 + i, backward_window_tokens=17 - 3 * i)
        for name, value in part.items():
            total[name] = total[name] + np.float64(value) * count / sum(counts)
    assert_close(total, wanted, SPLIT_TOLERANCE)


def test_small_passes(whole: Any, make_engine: MakeEngine, tmp_path: Path) -> None:
    """A pass of few rows cuts the windows itself."""
    engine, examples, wanted = whole
    engine.save_adapter("a", tmp_path)
    small = make_engine(engine.model_directory, max_num_batched_tokens=13, max_num_seqs=5, block_size=3)
    small.load_adapter("a", tmp_path)
    assert_close(small.loss_and_gradients("a", examples), wanted, SPLIT_TOLERANCE)


def test_while_serving(whole: Any) -> None:
    """Requests hold pages and positions of their own."""
    engine, examples, wanted = whole
    prompt = random_tokens(20, seed=1)
    alone = engine.submit(prompt, greedy(30), "a")
    tokens = run(engine).tokens(alone)
    request = engine.submit(prompt, greedy(30), "a")
    log = run(engine, until=lambda log: len(log.tokens(request)) >= 7)
    assert_close(engine.loss_and_gradients("a", examples, 8, 8), wanted, SPLIT_TOLERANCE)
    assert run(engine, log=log).tokens(request) == tokens
    assert is_idle(engine)


def test_smollm2(smollm2_engine: fc.Engine, smollm2_hf: Any, tmp_path: Path) -> None:
    """The real model, all 210 pairs of tensors."""
    model = load(smollm2_engine, smollm2_hf, tmp_path, "a", scale=0.02, r=4)
    examples = random_examples((40, 21), seed=2)
    wanted = oracle.gradients(model, examples)
    assert len(wanted) == 1 + 2 * 7 * 30
    assert_close(smollm2_engine.loss_and_gradients("a", examples, 16, 24), wanted, TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16(name: str, make_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """bfloat16 weights and activations: no further from the exact gradients than 1.5 times PEFT's own bfloat16."""
    engine, examples = make_engine(name, dtype="bfloat16"), random_examples(LENGTHS, seed=7)
    model = load(engine, tiny_hf(name), tmp_path, "a")
    exact, ours = oracle.gradients(model, examples), engine.loss_and_gradients("a", examples, 16, 16)
    theirs = oracle.gradients(oracle.in_bfloat16(model), examples)
    names = [key for key in exact if key != "loss"]
    errors = [np.sqrt(sum(np.linalg.norm(value[key] - exact[key]) ** 2 for key in names)) for value in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]
    assert ours["loss"] == pytest.approx(exact["loss"], rel=5e-3)
