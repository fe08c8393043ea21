"""Bad input: each with an error that names what is wrong, and an engine that goes on serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import MakeEngine
from running import generate, greedy, is_idle, random_examples, random_tokens

import flexcore as fc

PROMPT = random_tokens(9, seed=1)
EXAMPLES = random_examples((12, 20), seed=1)


@pytest.fixture(scope="module")
def module_engine(make_engine: MakeEngine) -> fc.Engine:
    engine = make_engine()
    engine.create_adapter("a", fc.LoraConfig(r=2))
    return engine


@pytest.fixture
def engine(module_engine: fc.Engine) -> Iterator[fc.Engine]:
    """After the error: the same tokens as before it, and nothing left behind."""
    wanted = generate(module_engine, [PROMPT], greedy(8), "a")
    yield module_engine
    assert generate(module_engine, [PROMPT], greedy(8), "a") == wanted
    assert [info.name for info in module_engine.adapters()] == ["a"]
    assert is_idle(module_engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt_token_ids: empty"),
        ([1, 160], "prompt_token_ids: unknown token id 160 at position 1.*160"),
        ([-1], "prompt_token_ids: unknown token id -1 at position 0"),
        ([2**40], "prompt_token_ids"),
        ([1.5], "prompt_token_ids"),
        ("text", "prompt_token_ids.*flexcore.LLM takes text"),
        (np.ones((2, 2), np.int64), "prompt_token_ids.*one dimension"),
        (list(range(3, 103)) * 3, "prompt_token_ids: 300 tokens.*max_model_len.*256"),
    ],
    ids=["empty", "unknown", "negative", "huge", "float", "text", "matrix", "long"],
)
def test_prompts(prompt: Any, message: str, engine: fc.Engine) -> None:
    with pytest.raises(fc.InvalidArgument, match=message) as raised:
        engine.submit(prompt)
    assert isinstance(raised.value, ValueError) and isinstance(raised.value, fc.Error)
    with pytest.raises(fc.InvalidArgument):
        engine.submit_batch([PROMPT, prompt])  # all or none
    assert not engine.has_work()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("n", 0),
        ("logprobs", -1),
        ("stop_token_ids", [500]),
        ("logit_bias", {500: 1.0}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: float("inf")}),
        # Sampling takes floats: these are no numbers, or none above 0, there.
        ("temperature", 1e300),
        ("top_p", 1e-300),
        ("presence_penalty", 1e300),
        ("frequency_penalty", -1e300),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", 1e-300),
        ("logit_bias", {5: 1e300}),
    ],
)
def test_sampling(field: str, value: Any, engine: fc.Engine) -> None:
    with pytest.raises(fc.InvalidArgument, match=field):
        engine.submit(PROMPT, fc.SamplingParams(**{field: value}))
    assert not engine.has_work()


def test_impossible_choice_fails_its_request_only(engine: fc.Engine) -> None:
    """Every token forbidden: nothing can be drawn. The event says so, and is no cancellation."""
    barred = fc.SamplingParams(max_tokens=4, logit_bias={token: -float("inf") for token in range(160)})
    never = fc.SamplingParams(max_tokens=4, min_tokens=3, stop_token_ids=list(range(160)))
    failed = engine.stats().get("requests_failed", 0)
    ids = engine.submit_batch([PROMPT] * 3, [barred, greedy(4), never])
    events: dict[int, list[fc.TokenEvent]] = {request: [] for request in ids}
    while engine.has_work():
        for event in engine.step().outputs:
            events[event.request_id].append(event)
    for request in (ids[0], ids[2]):
        (event,) = events[request]
        assert (event.token_id, event.finish_reason) == (-1, "error") and "no token left" in event.error
    assert len(events[ids[1]]) == 4 and all(event.error == "" for event in events[ids[1]])
    assert engine.stats()["requests_failed"] == failed + 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", 2**62),
        ("max_num_seqs", 2**62),
        ("max_num_batched_tokens", 2**62),
        ("block_size", 2**60),
        ("block_size", 2**40),
        ("kv_cache_memory_bytes", 2**62),
        ("num_threads", 5000),
    ],
)
def test_engine_settings(field: str, value: int, make_engine: MakeEngine) -> None:
    with pytest.raises(fc.InvalidArgument, match=field):
        make_engine(**{field: value})


def test_tokens_to_score(engine: fc.Engine) -> None:
    for tokens in ([160], [5, 160]):
        with pytest.raises(fc.InvalidArgument, match="token_ids: unknown token id 160"):
            engine.score(tokens)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (fc.Example([], []), r"examples\[1\].*0 tokens"),
        (fc.Example([5], [5]), r"examples\[1\].*1 tokens, wanted at least 2"),
        (fc.Example([5, 6, 7], [5, 6]), r"examples\[1\].labels: 2 labels, wanted as many as input_ids \(3\)"),
        (fc.Example([5, 6, 7], [-100] * 3), r"examples\[1\].labels.*-100"),
        (fc.Example([5, 6, 7], [5, -100, -100]), r"examples\[1\].labels.*no target"),
        (fc.Example([5, 999, 7], [5, 6, 7]), r"examples\[1\].input_ids: unknown token id 999"),
        (fc.Example([5, 6, 7], [5, 6, 999]), r"examples\[1\].labels: 999"),
        (fc.Example([5] * 300, [5] * 300), r"examples\[1\].input_ids: 300 tokens.*max_model_len"),
        ({"labels": [5]}, r"examples\[1\].*input_ids"),
        (7, r"examples\[1\]"),
    ],
)
def test_examples(example: Any, message: str, engine: fc.Engine) -> None:
    for act in (engine.finetune, engine.loss_and_gradients):
        with pytest.raises(fc.InvalidArgument, match=message):
            act("a", [EXAMPLES[0], example])
        with pytest.raises(fc.InvalidArgument, match="examples: empty"):
            act("a", [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_epochs", 0),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("optimizer", "lion"),
        ("lr_scheduler", "polynomial"),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", float("inf")),
        ("warmup_ratio", 1.5),
        ("window_tokens", 0),
        ("backward_window_tokens", -3),
        ("weight", 0.0),
        ("num_epochs", 2**62),
        ("learning_rate", 1e39),
        ("weight_decay", 1e39),
        ("betas", (0.9, 1.0 - 1e-12)),
        ("eps", 1e-50),
    ],
)
def test_finetune_settings(field: str, value: Any, engine: fc.Engine) -> None:
    with pytest.raises(fc.InvalidArgument, match=field):
        engine.finetune("a", EXAMPLES, fc.FinetuneConfig(**{field: value}))
    assert not engine.has_work() and not engine.adapters()[0].training


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r: 0"),
        ({"r": 10**6}, "r: 1000000"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 1e39}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": -1e39}}, "alpha_pattern: q_proj"),
        ({"target_modules": ["nothing"]}, 'target_modules.*"nothing"'),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", "v_prj"]}, 'target_modules.*"v_prj".*wanted.*"v_proj"'),
        ({"target_modules": "nothing.*"}, "target_modules.*nothing"),
        ({"rank_pattern": {"q_proj": 257}}, "rank_pattern: q_proj: 257, wanted 1 to 256"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
    ],
)
def test_lora_settings(config: dict[str, Any], message: str, engine: fc.Engine) -> None:
    with pytest.raises(fc.InvalidArgument, match=message):
        engine.create_adapter("b", fc.LoraConfig(**config))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_only_lora_outside_the_layers(name: str, engine: fc.Engine) -> None:
    with pytest.raises(fc.Unsupported, match=f'target_modules: "{name}"'):
        engine.create_adapter("b", fc.BottleneckConfig(4, target_modules=["q_proj", name]))


def test_unknown_adapter(engine: fc.Engine, tmp_path: Path) -> None:
    acts: list[Callable[[], Any]] = [
        lambda: engine.submit(PROMPT, adapter="b"),
        lambda: engine.score(PROMPT, "b"),
        lambda: engine.logits(PROMPT, "b"),
        lambda: engine.finetune("b", EXAMPLES),
        lambda: engine.loss_and_gradients("b", EXAMPLES),
        lambda: engine.save_adapter("b", tmp_path),
        lambda: engine.unload_adapter("b"),
    ]
    for act in acts:
        with pytest.raises(fc.InvalidArgument, match=r'"b" is not loaded, wanted "a"'):
            act()
    with pytest.raises(fc.InvalidArgument, match='"a" is loaded already'):
        engine.create_adapter("a")


def test_pool_smaller_than_one_sequence(make_engine: MakeEngine, engine: fc.Engine) -> None:
    """What can never fit is refused when it comes; what fits is served."""
    page = int(engine.memory()["kv_pages"] / engine.stats()["kv_blocks"])
    small = make_engine(kv_cache_memory_bytes=4 * page)  # 32 tokens
    small.create_adapter("a", fc.LoraConfig(r=2))
    with pytest.raises(fc.InvalidArgument, match=r"5 pages, but the pool has 4.*kv_cache_memory_bytes"):
        small.submit(PROMPT, greedy(30))
    with pytest.raises(fc.InvalidArgument, match=r"examples\[0\].*40 tokens keep at least.*the pool .kv_cache"):
        small.finetune("a", random_examples((40,), seed=1))
    with pytest.raises(fc.OutOfMemory, match="pages") as raised:
        small.score(random_tokens(40, seed=1))
    assert isinstance(raised.value, MemoryError)
    assert generate(small, [PROMPT], greedy(20)) == generate(engine, [PROMPT], greedy(20))
    assert is_idle(small)
