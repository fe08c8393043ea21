"""The sampling fields, one by one, against what they mean for the logits of `Engine.logits`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from engines import MakeEngine
from running import generate, greedy, random_tokens, run

import flexcore as fc

PROMPT = random_tokens(12, seed=3)
DRAWS = 1024  # of one distribution


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine) -> fc.Engine:
    return make_engine(max_num_seqs=64)


@pytest.fixture(scope="module")
def logits(engine: fc.Engine) -> np.ndarray:
    """Of the token after PROMPT."""
    return engine.logits(PROMPT)[-1].astype(np.float64)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def draw(engine: fc.Engine, **fields: Any) -> Counter[int]:
    """Many first tokens after PROMPT."""
    first = engine.submit(PROMPT, fc.SamplingParams(max_tokens=1, n=DRAWS, seed=11, **fields))
    log = run(engine)
    return Counter(log.tokens(first + i)[0] for i in range(DRAWS))


def assert_drawn_from(counts: Counter[int], probabilities: np.ndarray) -> None:
    assert all(probabilities[token] > 0 for token in counts)
    seen = np.array([counts[token] for token in range(len(probabilities))]) / DRAWS
    # The sum of |differences| of a multinomial sample is below sum of sqrt(2 p (1-p) / (pi n)), but for its own spread.
    expected = np.sqrt(2 * probabilities * (1 - probabilities) / (np.pi * DRAWS)).sum()
    assert np.abs(seen - probabilities).sum() < 1.5 * expected + 4 / np.sqrt(DRAWS)


def test_temperature(engine: fc.Engine, logits: np.ndarray) -> None:
    for temperature in (0.5, 1.0, 2.0):
        assert_drawn_from(draw(engine, temperature=temperature), softmax(logits / temperature))


def test_top_k(engine: fc.Engine, logits: np.ndarray) -> None:
    kept = np.where(logits >= np.sort(logits)[-5], logits, -np.inf)
    counts = draw(engine, top_k=5)
    assert len(counts) <= 5
    assert_drawn_from(counts, softmax(kept))
    assert_drawn_from(draw(engine, top_k=-1), softmax(logits))


def test_numbers_as_large_as_their_type(engine: fc.Engine, logits: np.ndarray) -> None:
    for top_k in (2**31, 2**32 + 1, 2**63 - 1):
        assert_drawn_from(draw(engine, top_k=top_k), softmax(logits))
    tokens = generate(engine, [PROMPT], greedy(2**63 - 1))[0]
    assert len(PROMPT) + len(tokens) == engine.model().max_model_len


def test_top_p(engine: fc.Engine, logits: np.ndarray) -> None:
    probabilities = softmax(logits / 1.5)
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1
    kept = np.zeros_like(probabilities)
    kept[order[:count]] = probabilities[order[:count]]
    assert_drawn_from(draw(engine, top_p=0.6, temperature=1.5), kept / kept.sum())


def test_min_p(engine: fc.Engine, logits: np.ndarray) -> None:
    probabilities = softmax(logits / 2)
    kept = np.where(probabilities >= 0.3 * probabilities.max(), probabilities, 0)
    assert 1 < (kept > 0).sum() < len(logits)
    assert_drawn_from(draw(engine, min_p=0.3, temperature=2.0), kept / kept.sum())


def test_one_candidate_is_greedy(engine: fc.Engine) -> None:
    wanted = generate(engine, [PROMPT], greedy(32))
    for fields in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        params = fc.SamplingParams(max_tokens=32, ignore_eos=True, **fields)
        assert generate(engine, [PROMPT], params) == wanted, fields


def test_logit_bias(engine: fc.Engine, logits: np.ndarray) -> None:
    assert generate(engine, [PROMPT], greedy(6, logit_bias={77: 1e4})) == [[77] * 6]
    best, second = np.argsort(-logits)[:2].tolist()
    assert generate(engine, [PROMPT], greedy(1, logit_bias={best: -float("inf")})) == [[second]]
    biased = logits.copy()
    biased[5] += 4.0
    biased[best] -= 2.0
    assert_drawn_from(draw(engine, logit_bias={5: 4.0, best: -2.0}), softmax(biased))


def penalised(row: np.ndarray, prompt: list[int], generated: list[int], fields: dict[str, Any]) -> np.ndarray:
    """repetition over prompt and answer (Keskar et al. 2019), presence and frequency over the answer (OpenAI)."""
    row = row.astype(np.float64).copy()
    for token, bias in fields.get("logit_bias", {}).items():
        row[token] += bias
    repetition = fields.get("repetition_penalty", 1.0)
    for token in set(prompt) | set(generated):
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token, count in Counter(generated).items():
        row[token] -= fields.get("frequency_penalty", 0.0) * count + fields.get("presence_penalty", 0.0)
    return row


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": -0.5, "presence_penalty": 0.4},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {9: 3.0, 8: 2.5}},
    ],
)
def test_penalties(fields: dict[str, Any], engine: fc.Engine) -> None:
    tokens = generate(engine, [PROMPT], greedy(40, **fields))[0]
    rows = engine.logits(PROMPT + tokens)
    for i, token in enumerate(tokens):
        wanted = penalised(rows[len(PROMPT) - 1 + i], PROMPT, tokens[:i], fields)
        assert wanted[token] >= wanted.max() - 1e-4, i
    assert tokens != generate(engine, [PROMPT], greedy(40))[0]


def test_logprobs(engine: fc.Engine) -> None:
    """Those of the raw logits, whatever the sampling: what `score` says of the same tokens."""
    params = fc.SamplingParams(max_tokens=20, ignore_eos=True, seed=2, temperature=0.7, top_k=20, logprobs=5)
    request = engine.submit(PROMPT, params)
    events = run(engine).events[request]
    tokens = [event.token_id for event in events]
    scores = engine.score(PROMPT + tokens)[len(PROMPT) - 1 :]
    assert [event.logprob for event in events] == pytest.approx(scores, abs=1e-4)
    rows = engine.logits(PROMPT + tokens)[len(PROMPT) - 1 : -1]
    for event, row in zip(events, rows, strict=True):
        wanted = np.log(softmax(row.astype(np.float64)))
        best = np.argsort(-wanted, kind="stable")[:5]
        assert [token for token, _ in event.top_logprobs] == best.tolist()
        assert [value for _, value in event.top_logprobs] == pytest.approx(wanted[best], abs=1e-4)
    plain = engine.submit(PROMPT, greedy(3))
    assert all(event.top_logprobs == [] and event.logprob < 0 for event in run(engine).events[plain])


def finish(engine: fc.Engine, params: fc.SamplingParams) -> tuple[list[int], str | None]:
    request = engine.submit(PROMPT, params)
    log = run(engine)
    return log.tokens(request), log.finished(request)


def test_stop_tokens(engine: fc.Engine) -> None:
    free = generate(engine, [PROMPT], greedy(30))[0]
    stop = free[10]
    at = free.index(stop)
    assert finish(engine, greedy(30, stop_token_ids=[stop])) == (free[: at + 1], "stop")
    assert finish(engine, greedy(30, stop_token_ids=[stop, free[0]])) == (free[:1], "stop")
    assert finish(engine, greedy(at + 1, stop_token_ids=[stop])) == (free[: at + 1], "stop")


def test_end_of_sequence(engine: fc.Engine) -> None:
    """logit_bias brings the model's own end; ignore_eos goes on, and stop tokens still count."""
    end = engine.model().eos_token_ids
    assert end == [2]
    pushed = {"logit_bias": {2: 1e4}, "max_tokens": 8, "temperature": 0.0}
    assert finish(engine, fc.SamplingParams(**pushed)) == ([2], "stop")
    assert finish(engine, fc.SamplingParams(ignore_eos=True, **pushed)) == ([2] * 8, "length")
    assert finish(engine, fc.SamplingParams(ignore_eos=True, stop_token_ids=[2], **pushed)) == ([2], "stop")


def test_min_tokens(engine: fc.Engine) -> None:
    """No end before them: what would end the request cannot be chosen."""
    pushed = {"logit_bias": {2: 1e4, 9: 1e3}, "max_tokens": 8, "temperature": 0.0}
    assert finish(engine, fc.SamplingParams(min_tokens=5, **pushed)) == ([9] * 5 + [2], "stop")
    both = fc.SamplingParams(min_tokens=3, stop_token_ids=[9], **pushed)
    tokens, reason = finish(engine, both)
    assert not {2, 9} & set(tokens[:3]) and tokens[3:] == [2] and reason == "stop"
    assert finish(engine, fc.SamplingParams(min_tokens=8, **pushed)) == ([9] * 8, "length")
