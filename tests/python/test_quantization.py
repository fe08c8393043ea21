"""Linears in 8 and 4 bits: served and trained as the dense weights that they stand for, planned to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import EXACT, MODELS, MakeEngine
from quantized import FORMATS, dequantized, quantized_hf
from running import generate, greedy, is_idle, random_examples, random_tokens, relative, run
from test_gradients import assert_close, load
from test_methods import gradients, saved

import flexcore as fc

TOLERANCE = 1e-4  # float32, norm-wise
LENGTHS = (70, 37, 2, 11)  # the longest first: errors about memory name it
GROUPS = {"int8": 32, "int4": 64, "nf4": 48}  # of 64 and 80 inputs: whole, and with a short last one


def make(make_engine: MakeEngine, name: str | Path, quantization: str, **changes: Any) -> fc.Engine:
    options = {"quantization": quantization, "quantization_group_size": GROUPS[quantization]}
    return make_engine(name, **(options | changes))


@pytest.fixture(scope="session")
def quantized(make_engine: MakeEngine, tiny_hf: Any) -> Callable[[str, str], tuple[fc.Engine, Any]]:
    """An engine, and transformers with the same weights."""
    made: dict[tuple[str, str], tuple[fc.Engine, Any]] = {}

    def get(name: str, quantization: str) -> tuple[fc.Engine, Any]:
        key = (name, quantization)
        if key not in made:
            hf = quantized_hf(tiny_hf(name), quantization, GROUPS[quantization])
            made[key] = (make(make_engine, name, quantization), hf)
        engine = made[key][0]
        for adapter in engine.adapters():
            engine.unload_adapter(adapter.name)
        return made[key]

    return get


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, quantization: str, quantized: Any, tiny_hf: Any) -> None:
    engine, hf = quantized(name, quantization)
    tokens = random_tokens(150, seed=5)
    wanted = oracle.logits(hf, tokens)
    assert relative(engine.logits(tokens), wanted) < TOLERANCE
    # The test means something: dense weights say something else.
    assert relative(oracle.logits(tiny_hf(name), tokens), wanted) > 20 * TOLERANCE
    info = engine.model()
    assert (info.quantization, info.quantization_group_size) == (quantization, GROUPS[quantization])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", FORMATS)
def test_the_same_bits_as_dense_weights(
    quantization: str, dtype: str, quantized: Any, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Served, scored and trained."""
    _, hf = quantized("llama_bias", quantization)
    hf.save_pretrained(tmp_path / "dense")
    engines = make(make_engine, "llama_bias", quantization, dtype=dtype), make_engine(tmp_path / "dense", dtype=dtype)
    assert engines[1].model().quantization == "none"
    examples, results = random_examples(LENGTHS, seed=3), []
    for engine in engines:
        engine.create_adapter("a", fc.LoraConfig(r=5, lora_alpha=9), seed=1)
        job = engine.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.03, batch_size=2, num_epochs=2))
        losses = run(engine).losses(job)
        gradients = engine.loss_and_gradients("a", examples, 9, 17)
        results.append((engine.logits(random_tokens(100, seed=2), "a"), losses, gradients))
    (logits, losses, gradients), (dense_logits, dense_losses, dense_gradients) = results
    if EXACT["device"] != "cpu":  # few rows have a kernel of their own there
        assert relative(logits, dense_logits) < (0.05 if dtype == "bfloat16" else TOLERANCE)
        return
    assert np.array_equal(logits, dense_logits) and losses == dense_losses
    assert all(np.array_equal(gradients[name], value) for name, value in dense_gradients.items())


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2_sliding"])
def test_gradients(name: str, quantization: str, quantized: Any, tmp_path: Path) -> None:
    """QLoRA: autograd through the dequantised weights, for every split, and where activations are recomputed."""
    engine, hf = quantized(name, quantization)
    model = load(engine, hf, tmp_path, "a")
    examples = random_examples(LENGTHS, seed=7)
    wanted = oracle.gradients(model, examples)
    assert all(np.linalg.norm(value) > 0 for key, value in wanted.items() if key != "loss")
    least = 0
    for split in ((None, None), (1, None), (None, 1), (9, 17), (33, 7)):
        assert_close(engine.loss_and_gradients("a", examples, *split), wanted, TOLERANCE)
    try:
        engine.set_finetune_memory(1)
        engine.loss_and_gradients("a", examples)
    except fc.InvalidArgument as error:  # "... 70 tokens keep at least N bytes ..."
        least = int(str(error).split("at least ")[1].split(" ")[0])
    engine.set_finetune_memory(least)
    assert_close(engine.loss_and_gradients("a", examples, 9, 17), wanted, TOLERANCE)
    engine.set_finetune_memory(None)
    assert is_idle(engine)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("case", ["dora", "ia3", "series", "parallel"])
def test_other_methods(case: str, quantization: str, quantized: Any, tmp_path: Path) -> None:
    """DoRA's norms are those of the weights that the codes stand for."""
    engine, hf = quantized("llama_bias", quantization)
    model = saved(case, hf, tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    tokens, examples = random_tokens(40, seed=1), random_examples((37, 11), seed=7)
    assert relative(engine.logits(tokens, "a"), oracle.logits(model, tokens)) < TOLERANCE
    assert_close(engine.loss_and_gradients("a", examples, 9, 17), gradients(model, examples), TOLERANCE)


def test_an_adapter_saved_as_before(quantized: Any, tmp_path: Path) -> None:
    engine, hf = quantized("llama", "nf4")
    engine.create_adapter("a", fc.LoraConfig(r=4, lora_alpha=8), seed=1)
    engine.finetune("a", random_examples(LENGTHS, seed=3), fc.FinetuneConfig(learning_rate=0.05, batch_size=1))
    run(engine)
    engine.save_adapter("a", tmp_path)
    tokens = random_tokens(60, seed=2)
    assert relative(engine.logits(tokens, "a"), oracle.logits(oracle.load_peft(hf, tmp_path), tokens)) < TOLERANCE
    engine.load_adapter("b", tmp_path)
    assert np.array_equal(engine.logits(tokens, "b"), engine.logits(tokens, "a"))


@pytest.mark.skipif(EXACT["device"] != "cpu", reason="few rows have a kernel of their own there")
@pytest.mark.parametrize("quantization", FORMATS)
def test_seeds_hold_in_any_batch(quantization: str, quantized: Any) -> None:
    engine, _ = quantized("llama", quantization)
    prompts = [random_tokens(3 + 7 * i, seed=i) for i in range(12)]
    params = [fc.SamplingParams(max_tokens=20, ignore_eos=True, seed=40 + i, temperature=0.7) for i in range(12)]
    alone = [generate(engine, [prompt], sampling)[0] for prompt, sampling in zip(prompts, params, strict=True)]
    assert generate(engine, prompts, params) == alone
    engine.create_adapter("a", fc.LoraConfig(r=4), seed=1)
    job = engine.finetune("a", random_examples(LENGTHS, seed=3), fc.FinetuneConfig(batch_size=1))
    ids = engine.submit_batch(prompts[::-1], params[::-1])
    log = run(engine)
    assert [log.tokens(request) for request in ids] == alone[::-1]
    assert engine.job(job).status == "succeeded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_planned_to_the_byte(
    name: str, quantization: str, dtype: str, make_engine: MakeEngine, tiny_dir: Callable[[str], Path]
) -> None:
    lora = fc.LoraConfig(r=5)
    config = fc.EngineConfig(
        **(EXACT | {"dtype": dtype, "quantization": quantization, "quantization_group_size": GROUPS[quantization]})
    )
    plan = fc.plan(tiny_dir(name), config, lora, 100)
    engine = make(make_engine, name, quantization, dtype=dtype)
    engine.create_adapter("a", lora)
    engine.finetune("a", random_examples((100,) * 8, seed=1))
    engine.submit(random_tokens(20, seed=1), greedy(8))
    run(engine)
    peak = engine.memory_peak()
    assert peak["weights"] == engine.memory()["weights"] == plan.weights
    assert peak["saved_activations"] == plan.saved_activations and peak["workspace"] <= plan.workspace
    assert plan.weights < fc.plan(tiny_dir(name), fc.EngineConfig(**(EXACT | {"dtype": dtype})), lora, 100).weights


def test_sources_of_other_types(make_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """bfloat16 and float16 files give what their own numbers do."""
    import copy

    import torch
    import transformers

    tokens = random_tokens(20, seed=3)
    for dtype in (torch.bfloat16, torch.float16):
        copy.deepcopy(tiny_hf("llama")).to(dtype).save_pretrained(tmp_path / str(dtype))
        stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype=torch.float32).eval()
        engine = make(make_engine, tmp_path / str(dtype), "int4")
        wanted = oracle.logits(quantized_hf(stored, "int4", GROUPS["int4"]), tokens)
        assert relative(engine.logits(tokens), wanted) < TOLERANCE


@pytest.mark.parametrize("quantization", FORMATS)
def test_gguf(quantization: str, smollm2_gguf: Path, smollm2_hf: Any) -> None:
    """SmolLM2 out of its file; the sizes that 4 and 8 bits promise."""
    config = {"max_model_len": 64, "max_num_seqs": 2, "block_size": 16, "quantization": quantization}
    engine = fc.Engine(smollm2_gguf, fc.EngineConfig(**(EXACT | config)))
    tokens = random_tokens(40, seed=3, vocab_size=49152)
    assert relative(engine.logits(tokens), oracle.logits(quantized_hf(smollm2_hf, quantization), tokens)) < TOLERANCE
    layers = sum(p.numel() for n, p in smollm2_hf.named_parameters() if ".layers." in n and p.dim() == 2)
    rest = sum(p.numel() for p in smollm2_hf.parameters()) - layers
    stored = engine.memory()["weights"] - 4 * rest
    wanted = (1 if quantization == "int8" else 0.5) + 4 / 64  # a weight
    assert stored == pytest.approx(wanted * layers, rel=2e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization", "int3"),
        ("quantization", ""),
        ("quantization", "INT4"),
        ("quantization_group_size", 0),
        ("quantization_group_size", -64),
        ("quantization_group_size", 24),
        ("quantization_group_size", 2**40),
    ],
)
def test_bad_values(field: str, value: Any, make_engine: MakeEngine, tiny_dir: Callable[[str], Path]) -> None:
    changes = {"quantization": "int4"} | {field: value}
    with pytest.raises(fc.InvalidArgument, match=field):
        make_engine(**changes)
    with pytest.raises(fc.InvalidArgument, match=field):
        fc.plan(tiny_dir("llama"), fc.EngineConfig(**(EXACT | changes)))


def test_the_command_line(tiny_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from flexcore import cli

    weights = {}
    for quantization in ("none", *FORMATS):
        command = ["plan", str(tiny_dir("llama")), "--quantization", quantization, "--json", "-"]
        assert cli.main(command) == 0
        weights[quantization] = json.loads(capsys.readouterr().out)["weights"]
    assert weights["none"] > weights["int8"] > weights["int4"] == weights["nf4"]
    assert cli.main(["plan", str(tiny_dir("llama")), "--quantization", "int4", "--quantization-group-size", "32"]) == 0
    assert "int4" in capsys.readouterr().out


def test_errors_of_the_formats() -> None:
    """Of normal numbers, in groups of 64; 8 bits are 17 times closer than 4."""
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    errors = {name: relative(dequantized(weight, name), weight) for name in FORMATS}
    assert errors["int8"] < 0.006 < 0.08 < min(errors["int4"], errors["nf4"])
    assert max(errors["int4"], errors["nf4"]) < 0.1
