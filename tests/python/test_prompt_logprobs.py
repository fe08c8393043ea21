"""SamplingParams.prompt_logprobs: the serving path scores a prompt on its way, in any chunks and beside anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import MakeEngine, clear
from running import Log, greedy, random_examples, random_tokens, run

import flexcore as fc

PROMPTS = [random_tokens(length, seed=length) for length in (1, 2, 7, 40, 130)]


def all_ended(requests: list[int]) -> Callable[[Log], bool]:
    return lambda log: all(log.finished(request) for request in requests)


@pytest.mark.parametrize("rows", [7, 24, 256])
def test_they_are_the_scores(rows: int, make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=rows, max_num_seqs=min(rows, 8), min_finetune_share=0.2)
    wanted = [engine.score(prompt) for prompt in PROMPTS]
    engine.create_adapter("a", fc.LoraConfig(r=3))
    job = engine.finetune("a", random_examples((30, 60), seed=1), fc.FinetuneConfig(num_epochs=5000, batch_size=1))
    both, rounds = 0, 0
    while rounds < 2 or (both == 0 and rounds < 50):  # from the second on, a prefix cache could have kept them
        rounds += 1
        ids = engine.submit_batch(PROMPTS, greedy(5, prompt_logprobs=True))
        plain = engine.submit(PROMPTS[-1], greedy(5))
        log = run(engine, until=all_ended([*ids, plain]))
        both += sum(r.num_prefill_tokens > 0 and r.num_finetune_forward_tokens > 0 for r in log.reports)
        for request, scores in zip(ids, wanted, strict=True):
            first, *others = log.events[request]
            assert first.prompt_logprobs == pytest.approx(scores, abs=1e-5)
            assert not any(event.prompt_logprobs for event in others)
        assert not any(event.prompt_logprobs for event in log.events[plain])
        assert log.tokens(plain) == log.tokens(ids[-1])
    assert both > 0  # losses and scores in one pass
    assert engine.job(job).status in ("running", "succeeded")
    clear(engine)


def test_they_survive_preemption(make_engine: MakeEngine) -> None:
    page = 2 * 3 * 2 * 16 * 4 * 4
    engine = make_engine(kv_cache_memory_bytes=24 * page, block_size=4, max_num_seqs=6, max_num_batched_tokens=16)
    prompts = [random_tokens(20, seed=k) for k in range(6)]
    wanted = [engine.score(prompt) for prompt in prompts]
    ids = engine.submit_batch(prompts, greedy(30, prompt_logprobs=True))
    log = run(engine)
    assert engine.stats()["preemptions"] > 0
    for request, scores in zip(ids, wanted, strict=True):
        assert log.events[request][0].prompt_logprobs == pytest.approx(scores, abs=1e-5)
        assert len(log.tokens(request)) == 30
