"""Prompt and prefix tuning against PEFT: logits, gradients in every split, files, serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from engines import MODELS, MakeEngine
from running import generate, greedy, is_idle, random_examples, random_tokens, relative, run
from test_gradients import LENGTHS, SPLIT_TOLERANCE, TOLERANCE, assert_close
from test_recompute import budgets

import flexcore as fc

TOKENS = random_tokens(40, seed=1)
KINDS = ("prompt", "prefix")
CONFIGS: dict[str, Any] = {"prompt": fc.PromptTuningConfig, "prefix": fc.PrefixTuningConfig}


def load(engine: fc.Engine, hf: Any, kind: str, directory: Path, count: int = 7, seed: int = 3) -> Any:
    model = oracle.virtual_adapter(hf, kind, count, seed)
    model.save_pretrained(directory / kind)
    engine.load_adapter(kind, directory / kind)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_against_autograd(kind: str, name: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine(name)
    model = load(engine, tiny_hf(name), kind, tmp_path)
    with torch.no_grad():
        wanted = oracle.virtual_logits(model, TOKENS).numpy()
    assert relative(engine.logits(TOKENS, kind), wanted) < TOLERANCE
    assert relative(engine.logits(TOKENS), wanted) > 1e-3
    examples = random_examples(LENGTHS, seed=7)
    assert_close(engine.loss_and_gradients(kind, examples), oracle.virtual_gradients(model, kind, examples), TOLERANCE)
    whole = random_examples((31, 12), seed=8, masked=False)  # the first token has a label
    assert_close(engine.loss_and_gradients(kind, whole), oracle.virtual_gradients(model, kind, whole), TOLERANCE)
    assert is_idle(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_and_budgets(kind: str, make_engine: MakeEngine, tiny_hf: Any, tiny_dir: Any, tmp_path: Path) -> None:
    engine = make_engine("qwen3", max_num_batched_tokens=128, max_num_seqs=1)
    load(engine, tiny_hf("qwen3"), kind, tmp_path)
    examples = random_examples((70, 23), seed=9)
    wanted = engine.loss_and_gradients(kind, examples)
    assert np.linalg.norm(wanted["prompt_embeddings"]) > 0
    for split in ((1, 1), (1, None), (None, 1), (3, 5), (33, 7)):
        assert_close(engine.loss_and_gradients(kind, examples, *split), wanted, SPLIT_TOLERANCE)
    choices = budgets(tiny_dir("qwen3"), CONFIGS[kind](7), 70)
    for budget, _ in choices[:: max(1, len(choices) // 4)] + choices[-1:]:
        engine.set_finetune_memory(budget)
        assert_close(engine.loss_and_gradients(kind, examples, 9, 17), wanted, SPLIT_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_here_loaded_by_peft(kind: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine("llama")
    more = {"init_token_ids": [5, 9, 11]} if kind == "prompt" else {}
    engine.create_adapter("a", CONFIGS[kind](6, **more), seed=2)
    before = engine.score(TOKENS, "a")
    if kind == "prompt":  # the embeddings of tokens, as if they were there
        assert relative(before[:-1], engine.score([5, 9, 11, 5, 9, 11, *TOKENS[:-1]])[6:]) < 1e-5
    config = fc.FinetuneConfig(learning_rate=0.05, num_epochs=6, batch_size=2)
    job = engine.finetune("a", random_examples((20, 30), seed=1), config)
    losses = run(engine).losses(job)
    assert losses[-1] < losses[0]
    assert engine.job(job).trained_tokens == 6 * 50
    assert relative(engine.score(TOKENS, "a"), before) > 1e-3
    engine.save_adapter("a", tmp_path)
    model = oracle.load_peft(tiny_hf("llama"), tmp_path)
    with torch.no_grad():
        wanted = oracle.virtual_logits(model, TOKENS).numpy()
    assert relative(engine.logits(TOKENS, "a"), wanted) < TOLERANCE
    engine.load_adapter("b", tmp_path)
    assert np.array_equal(engine.logits(TOKENS, "b"), engine.logits(TOKENS, "a"))
    assert engine.adapters()[0].peft_type == f"{kind.upper()}_TUNING"


@pytest.mark.parametrize("kind", KINDS)
def test_serving(kind: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Greedy tokens are those of PEFT's logits; beside others, from the prefix cache, and with penalties as well."""
    engine = shared_engine("llama")
    model = load(engine, tiny_hf("llama"), kind, tmp_path, count=11)
    prompt = random_tokens(21, seed=5)
    wanted = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            wanted.append(int(oracle.virtual_logits(model, wanted)[-1].argmax()))
    engine.create_adapter("lora", fc.LoraConfig(r=4))
    others = [random_tokens(9, seed=6), random_tokens(33, seed=7)]
    together = generate(engine, [prompt, *others], greedy(8), [kind, None, "lora"])
    assert together[0] == wanted[21:]
    assert together[1:] == [generate(engine, [other], greedy(8))[0] for other in others]
    request = engine.submit(prompt, greedy(8), kind)
    log = run(engine)
    assert log.tokens(request) == wanted[21:]
    assert log.events[request][0].num_cached_tokens == (11 + 21) // 8 * 8 - 11 - (8 if (11 + 21) % 8 == 0 else 0)
    sampling = greedy(8, repetition_penalty=1.3, prompt_logprobs=True)
    request = engine.submit(prompt, sampling, kind)
    log = run(engine)
    assert len(log.tokens(request)) == 8
    scores = log.events[request][0].prompt_logprobs
    assert relative(np.array(scores), engine.score(prompt, kind)) < 1e-5


def test_refusals(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine("llama")
    for config, message in (
        (fc.PromptTuningConfig(0), "num_virtual_tokens: 0, wanted 1"),
        (fc.PrefixTuningConfig(4, token_dim=7), "token_dim: 7, wanted 32"),
        (fc.PromptTuningConfig(4, num_layers=7), "num_layers: 7, wanted 3"),
        (fc.PromptTuningConfig(4, init_token_ids=[1, 100000]), "init_token_ids: unknown token id 100000"),
    ):
        with pytest.raises(fc.InvalidArgument, match=message):
            engine.create_adapter("a", config)
    engine.create_adapter("a", fc.PromptTuningConfig(20))
    with pytest.raises(fc.InvalidArgument, match=r"max_model_len \(256\) less 20 virtual tokens"):
        engine.submit(random_tokens(236, seed=1), greedy(1), "a")
    with pytest.raises(fc.InvalidArgument, match=r"max_model_len \(256\) less 20 virtual tokens"):
        engine.finetune("a", random_examples((237,), seed=1))
    with pytest.raises(fc.InvalidArgument, match=r"max_model_len \(256\) less 20 virtual tokens"):
        engine.score(random_tokens(237, seed=1), "a")
    request = engine.submit(random_tokens(235, seed=1), greedy(50), "a")
    assert len(run(engine).tokens(request)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_planned_memory(kind: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    from engines import EXACT

    engine = make_engine("llama", max_num_seqs=1)
    engine.create_adapter("a", CONFIGS[kind](9))
    engine.finetune("a", random_examples((70,), seed=3), fc.FinetuneConfig(num_epochs=2))
    run(engine)
    config = fc.EngineConfig(**(EXACT | {"max_num_seqs": 1}))
    plan = fc.plan(tiny_dir("llama"), config, CONFIGS[kind](9), 70)
    peak = engine.memory_peak()
    for tag in ("adapters", "gradients", "optimizer", "saved_activations"):
        assert peak[tag] == getattr(plan, tag), tag
