"""Requests: mixed batches, adapters, prefix caching, chunks, preemption, cancellation, and who holds which page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import MakeEngine, least_pool
from running import Log, generate, greedy, is_idle, random_examples, random_tokens, run

import flexcore as fc

PROMPTS = [random_tokens(length, seed=length) for length in (1, 8, 9, 33, 70, 120, 16, 2)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4},
    "qv": {"r": 9, "target_modules": ["q_proj", "v_proj"]},
    "down": {"r": 2, "target_modules": ["down_proj"], "use_rslora": True},
}
NAMES = [None, "all", "qv", "down", None, "all", "down", "qv"]
SWAP_SPACE = 4_000_000  # enough for what goes there


@pytest.fixture(scope="module")
def adapter_dirs(tiny_hf: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT adapters strong enough to change every token."""
    made = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        made[name] = tmp_path_factory.mktemp(name)
        oracle.peft_adapter(tiny_hf("llama"), seed, scale=0.4, **config).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine, adapter_dirs: dict[str, Path]) -> Iterator[fc.Engine]:
    made = make_engine()
    for name, directory in adapter_dirs.items():
        made.load_adapter(name, directory)
    yield made
    assert is_idle(made)
    for name in ADAPTERS:
        made.unload_adapter(name)
    assert made.memory()["adapters"] == 0


def sampled(seed: int | None = None, max_tokens: int = 24, **more: Any) -> fc.SamplingParams:
    return fc.SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True, "seed": seed} | more))


def test_mixed_batch_equals_each_alone(engine: fc.Engine) -> None:
    alone = [generate(engine, [p], greedy(24), name)[0] for p, name in zip(PROMPTS, NAMES, strict=True)]
    assert generate(engine, PROMPTS, greedy(24), NAMES) == alone
    assert generate(engine, PROMPTS[::-1], greedy(24), NAMES[::-1]) == alone[::-1]
    for name in ADAPTERS:  # they say something else than the base model
        assert generate(engine, PROMPTS[3:5], greedy(24), name) != generate(engine, PROMPTS[3:5], greedy(24))


def test_seeds_hold_in_any_batch(engine: fc.Engine) -> None:
    params = [sampled(seed=40 + i, temperature=0.5 + 0.2 * i, top_p=0.95) for i in range(8)]
    alone = [generate(engine, [PROMPTS[i]], params[i], NAMES[i])[0] for i in range(8)]
    assert generate(engine, PROMPTS, params, NAMES) == alone
    noise = [engine.submit(random_tokens(30, seed=70 + i), sampled(), NAMES[i]) for i in range(5)]
    for _ in range(3):
        engine.step()
    assert generate(engine, PROMPTS[::-1], params[::-1], NAMES[::-1]) == alone[::-1]
    assert noise
    other = [sampled(seed=80 + i, temperature=0.5 + 0.2 * i, top_p=0.95) for i in range(8)]
    assert all(a != b for a, b in zip(generate(engine, PROMPTS, other, NAMES), alone, strict=True))


def test_seeds_of_the_engine(make_engine: MakeEngine) -> None:
    """Without a seed of its own a request draws from the engine's: no two alike, and a new engine repeats them."""
    first, second = (generate(make_engine(seed=3), [PROMPTS[3]] * 4, sampled()) for _ in range(2))
    assert first == second
    assert len(set(map(tuple, first))) == 4
    assert generate(make_engine(seed=4), [PROMPTS[3]] * 4, sampled()) != first


def test_several_answers(engine: fc.Engine) -> None:
    """n answers under consecutive ids, each another draw; greedy ones are all the same."""
    first = engine.submit(PROMPTS[4], sampled(seed=1, n=4))
    log = run(engine)
    answers = [log.tokens(first + i) for i in range(4)]
    assert len(set(map(tuple, answers))) == 4
    assert answers[0] == generate(engine, [PROMPTS[4]], sampled(seed=1))[0]
    again = engine.submit(PROMPTS[4], sampled(seed=1, n=4))
    assert again >= first + 4
    log = run(engine)
    assert [log.tokens(again + i) for i in range(4)] == answers
    same = engine.submit(PROMPTS[4], greedy(10, n=3))
    log = run(engine)
    assert len({tuple(log.tokens(same + i)) for i in range(3)}) == 1


def test_finish_reasons_and_counts(engine: fc.Engine) -> None:
    ids = engine.submit_batch(PROMPTS, [greedy(3 + i) for i in range(8)])
    log = run(engine)
    for i, request in enumerate(ids):
        assert [event.finish_reason for event in log.events[request]] == [None] * (2 + i) + ["length"]
    assert sum(r.num_prefill_tokens for r in log.reports) <= sum(map(len, PROMPTS))
    assert all(r.explain and "\n" not in r.explain and r.elapsed_ms > 0 for r in log.reports)


def test_length_of_the_model_ends_a_request(engine: fc.Engine) -> None:
    request = engine.submit(random_tokens(250, seed=1), greedy(100))
    log = run(engine)
    assert len(log.tokens(request)) == 6 and log.finished(request) == "length"


def test_prefix_caching(make_engine: MakeEngine) -> None:
    cached, plain = make_engine(), make_engine(enable_prefix_caching=False)
    prefix = random_tokens(83, seed=5)
    prompts = [prefix + random_tokens(4 + i, seed=i) for i in range(4)]
    wanted = [generate(plain, [p], greedy(16))[0] for p in prompts]
    assert plain.stats()["prefix_cache_hits"] == 0
    assert generate(cached, prompts[:1], greedy(16)) == wanted[:1]
    assert cached.stats()["prefix_cache_hits"] == 0
    log = Log()
    ids = cached.submit_batch(prompts, greedy(16))
    run(cached, log=log)
    assert [log.tokens(i) for i in ids] == wanted
    blocks = 83 // 8 * 8
    assert cached.stats()["prefix_cache_hits"] >= 4 * blocks
    assert sum(r.num_prefill_tokens for r in log.reports) <= sum(len(p) - blocks for p in prompts)
    # A prompt that is cached as a whole still needs its last token's logits.
    assert generate(cached, [prefix[:80]] * 2, greedy(16)) == generate(plain, [prefix[:80]] * 2, greedy(16))
    assert is_idle(cached)


def test_events_tell_what_was_cached_and_when_the_first_token_came(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = random_tokens(40, seed=8)
    first = engine.submit(prompt, greedy(4))
    assert [event.num_cached_tokens for event in run(engine).events[first]] == [0] * 4
    again = engine.submit(prompt, greedy(4))
    events = run(engine).events[again]
    assert [event.num_cached_tokens for event in events] == [32] * 4  # blocks of 8, the last token left out
    assert events[0].ttft_ms > 0 and len({event.ttft_ms for event in events}) == 1
    request = engine.submit(prompt, greedy(4))
    engine.cancel(request)
    (cancelled,) = engine.step().outputs
    assert (cancelled.finish_reason, cancelled.ttft_ms, cancelled.error) == ("cancelled", 0.0, "")


def test_no_stale_prefix(make_engine: MakeEngine, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The same prompt under the base model, two adapters, a new version, and a new adapter of the old name."""
    engine, plain = make_engine(), make_engine(enable_prefix_caching=False)
    prompt = random_tokens(90, seed=6)
    for target in (engine, plain):
        target.load_adapter("x", adapter_dirs["all"])
        target.load_adapter("y", adapter_dirs["qv"])

    def check() -> list[int]:
        for _ in range(2):
            for name in (None, "x", "y"):
                assert generate(engine, [prompt], greedy(12), name) == generate(plain, [prompt], greedy(12), name)
        return generate(engine, [prompt], greedy(12), "x")[0]

    answers = [check()]
    for steps in range(2):  # a new version after every optimizer step
        for target in (engine, plain):
            target.finetune("x", random_examples((20, 30), seed=steps), fc.FinetuneConfig(learning_rate=0.2))
            run(target)
        answers.append(check())
    for target in (engine, plain):
        target.unload_adapter("x")
        target.load_adapter("x", adapter_dirs["down"])
    answers.append(check())
    assert len(set(map(tuple, answers))) == 4
    assert engine.stats()["prefix_cache_hits"] > 0


@pytest.mark.parametrize("rows", [1, 5, 17, 256])
def test_chunks_change_nothing(rows: int, engine: fc.Engine, make_engine: MakeEngine, adapter_dirs: Any) -> None:
    wanted = generate(engine, PROMPTS, greedy(8), NAMES)
    other = make_engine(max_num_batched_tokens=rows, block_size=5, enable_prefix_caching=False)
    for name, directory in adapter_dirs.items():
        other.load_adapter(name, directory)
    assert generate(other, PROMPTS, greedy(8), NAMES) == wanted


def pool_of(engine: fc.Engine, pages: int) -> int:
    """Bytes of so many pages."""
    memory, blocks = engine.memory()["kv_pages"], engine.stats()["kv_blocks"]
    return int(memory / blocks * pages)


@pytest.mark.parametrize("caching", [True, False])
def test_preemption(caching: bool, engine: fc.Engine, make_engine: MakeEngine, adapter_dirs: Any) -> None:
    """A pool for less than two of the eight sequences at their longest: all finish, with the same tokens."""
    params = [sampled(seed=i, max_tokens=60) for i in range(8)]
    wanted = generate(engine, PROMPTS, params, NAMES)
    small = make_engine(kv_cache_memory_bytes=pool_of(engine, 32), enable_prefix_caching=caching)
    for name, directory in adapter_dirs.items():
        small.load_adapter(name, directory)
    assert small.stats()["kv_blocks"] == 32
    assert generate(small, PROMPTS, params, NAMES) == wanted
    assert small.stats()["preemptions"] > 0
    assert is_idle(small)


@pytest.mark.parametrize(
    "adapter",
    [{}, {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_small_pool_with_training(
    adapter: dict[str, Any], engine: fc.Engine, make_engine: MakeEngine, tiny_dir: Any
) -> None:
    """Training gives its pages back to requests, begins its sequence again, and has the same losses. What the forward
    adds to an output layer's gradient is added once."""
    examples = random_examples((200, 150, 180), seed=3)
    config = fc.FinetuneConfig(batch_size=3, num_epochs=2, learning_rate=1e-2, window_tokens=8)
    wanted = generate(engine, PROMPTS, greedy(60))
    losses = []
    method = fc.LoraConfig(r=4, **adapter)
    for pool, prompts in ((engine.memory()["kv_pages"], []), (least_pool(tiny_dir("llama"), method, 200), PROMPTS)):
        trained = make_engine(kv_cache_memory_bytes=pool)
        trained.create_adapter("a", method, seed=1)
        job = trained.finetune("a", examples, config)
        log = run(trained, until=lambda log: len(log.reports) >= 5)
        ids = [trained.submit(prompt, greedy(60)) for prompt in prompts]
        run(trained, log=log)
        losses.append(log.losses(job))
        assert trained.job(job).status == "succeeded"
        assert [log.tokens(request) for request in ids] == wanted[: len(ids)]
        assert is_idle(trained)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert trained.stats()["finetune_restarts"] > 0


def in_backward(log: Log) -> bool:
    return any(report.num_backward_units > 0 for report in log.reports)


def test_backward_phases_give_pages_to_requests(engine: fc.Engine, make_engine: MakeEngine, tiny_dir: Any) -> None:
    """What they keep waits in host memory meanwhile: answers, losses and the adapter are as without requests."""
    examples = random_examples((200, 150, 180), seed=3)
    config = fc.FinetuneConfig(batch_size=3, num_epochs=2, learning_rate=1e-2, backward_window_tokens=8)
    wanted = generate(engine, PROMPTS, greedy(60))
    method = fc.LoraConfig(r=4)
    pool = least_pool(tiny_dir("llama"), method, 200, swap_space_bytes=SWAP_SPACE)
    losses, adapters = [], []
    for prompts in ([], PROMPTS):
        trained = make_engine(policy="token-cap:8", kv_cache_memory_bytes=pool, swap_space_bytes=SWAP_SPACE)
        trained.create_adapter("a", method, seed=1)
        job = trained.finetune("a", examples, config)
        log = run(trained, until=in_backward)
        ids = [trained.submit(prompt, greedy(60)) for prompt in prompts]
        run(trained, log=log)
        losses.append(log.losses(job))
        adapters.append(trained.loss_and_gradients("a", examples[:1]))
        assert trained.job(job).status == "succeeded"
        assert [log.tokens(request) for request in ids] == wanted[: len(ids)]
        assert (trained.stats()["finetune_swaps"] > 0) == bool(prompts)
        assert is_idle(trained)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in adapters[0].items():
        assert np.allclose(adapters[1][name], value, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("policy", ["token-cap:8", "inference-only"])
def test_backward_phases_without_swap_space(
    policy: str, paused: bool, engine: fc.Engine, make_engine: MakeEngine, tiny_dir: Any
) -> None:
    """They are worked off for the requests that wait for their pages, when nobody would give them any time; a job that
    was paused meanwhile goes on from there."""
    examples = random_examples((200,), seed=3)
    config = fc.FinetuneConfig(batch_size=1, num_epochs=2, learning_rate=1e-2, backward_window_tokens=8)
    prompt = random_examples((240,), seed=4)[0].input_ids
    wanted = generate(engine, [prompt], greedy(4))
    method = fc.LoraConfig(r=4)
    trained = make_engine(policy="token-cap:8", kv_cache_memory_bytes=least_pool(tiny_dir("llama"), method, 200))
    trained.create_adapter("a", method, seed=1)
    trained.create_adapter("b", method, seed=1)
    job = trained.finetune("b", examples, config)
    losses = run(trained).losses(job)
    job = trained.finetune("a", examples, config)
    log = run(trained, until=in_backward)
    if paused:
        trained.pause_job(job)
    trained.set_policy(policy)
    request = trained.submit(prompt, greedy(4))
    run(trained, log=log, until=lambda log: log.finished(request) is not None)
    assert log.tokens(request) == wanted[0]
    trained.set_policy("hybrid")
    if paused:
        assert trained.job(job).step == 0
        trained.resume_job(job)
    run(trained, log=log)
    assert trained.job(job).status == "succeeded"
    assert log.losses(job) == pytest.approx(losses, rel=1e-4)


def test_a_job_that_ends_while_swapped_out(make_engine: MakeEngine, tiny_dir: Any) -> None:
    method = fc.LoraConfig(r=4)
    pool = least_pool(tiny_dir("llama"), method, 200, swap_space_bytes=SWAP_SPACE)
    engine = make_engine(policy="token-cap:8", kv_cache_memory_bytes=pool, swap_space_bytes=SWAP_SPACE)
    engine.create_adapter("a", method, seed=1)
    job = engine.finetune("a", random_examples((200,), seed=3), fc.FinetuneConfig(backward_window_tokens=8))
    log = run(engine, until=in_backward)
    engine.submit(random_examples((240,), seed=4)[0].input_ids, greedy(4))
    run(engine, log=log, until=lambda log: engine.stats()["finetune_swaps"] > 0)
    assert engine.memory()["saved_activations"] == 0 < engine.memory()["offloaded_activations"]
    assert engine.stats()["swap_blocks_free"] < engine.stats()["swap_blocks"]
    engine.cancel_job(job)
    assert engine.memory()["offloaded_activations"] == 0
    assert engine.stats()["swap_blocks_free"] == engine.stats()["swap_blocks"]
    run(engine, log=log)
    assert is_idle(engine)


def test_cancel_frees_at_once(engine: fc.Engine) -> None:
    free = engine.stats()["kv_blocks_free"]
    ids = engine.submit_batch(PROMPTS[3:6], greedy(50), "all")
    wanted = generate(engine, [PROMPTS[4]], greedy(50), "all")[0]
    ids = engine.submit_batch(PROMPTS[3:6], greedy(50), "all")
    log = run(engine, until=lambda log: len(log.tokens(ids[1])) >= 10)
    waiting = engine.submit(PROMPTS[0], greedy(5))
    held = free - engine.stats()["kv_blocks_free"]
    assert engine.cancel(ids[0]) and engine.cancel(waiting)
    assert engine.cancel(ids[0]) is False and engine.cancel(10**9) is False
    assert free - engine.stats()["kv_blocks_free"] < held
    run(engine, log=log)
    assert log.tokens(ids[1]) == wanted
    for request, tokens in ((ids[0], 1), (waiting, 0)):
        assert log.finished(request) == "cancelled" and len(log.tokens(request)) >= tokens
        assert log.events[request][-1].token_id == -1
    assert is_idle(engine)


def test_unload_while_requests_run(make_engine: MakeEngine, adapter_dirs: dict[str, Path]) -> None:
    engine = make_engine()
    engine.load_adapter("x", adapter_dirs["all"])
    wanted = generate(engine, PROMPTS[3:5], greedy(30), "x")
    ids = engine.submit_batch(PROMPTS[3:5], greedy(30), "x")
    log = run(engine, until=lambda log: len(log.tokens(ids[0])) >= 5)
    engine.unload_adapter("x")
    assert engine.adapters() == [] and engine.memory()["adapters"] > 0
    with pytest.raises(fc.InvalidArgument, match='"x" is not loaded'):
        engine.submit(PROMPTS[0], greedy(), "x")
    engine.load_adapter("x", adapter_dirs["down"])  # the name is free
    later = engine.submit_batch(PROMPTS[3:5], greedy(30), "x")
    run(engine, log=log)
    assert [log.tokens(i) for i in ids] == wanted
    assert [log.tokens(i) for i in later] == generate(engine, PROMPTS[3:5], greedy(30), "x") != wanted
    engine.unload_adapter("x")
    assert engine.memory()["adapters"] == 0
    assert is_idle(engine)


def test_more_requests_than_fit(make_engine: MakeEngine, engine: fc.Engine) -> None:
    """They wait for their turn."""
    small = make_engine(max_num_seqs=3)
    prompts = PROMPTS * 4
    assert generate(small, prompts, greedy(6)) == generate(engine, PROMPTS, greedy(6)) * 4
    assert is_idle(small)
