"""fc.LLM: text in, text out, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore.tiny import write_tiny_model

GREEDY = fc.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> fc.LLM:
    directory = write_byte_tokenizer(write_tiny_model(tmp_path_factory.mktemp("llm"), vocab_size=272))
    return fc.LLM(directory, dtype="float32", max_model_len=128, max_num_seqs=8)


def with_fields(**changes: object) -> fc.SamplingParams:
    return fc.SamplingParams(**{**{name: getattr(GREEDY, name) for name in GREEDY._fields}, **changes})


def test_generate(llm: fc.LLM) -> None:
    first, second = llm.generate(["hello", "ab"], GREEDY)
    assert (first.prompt, first.finish_reason, len(first.token_ids)) == ("hello", "length", 12)
    assert first.text == llm.tokenizer.decode(first.token_ids)
    assert llm.generate("hello", GREEDY)[0].text == first.text
    assert llm.generate(llm.tokenizer.encode("ab"), GREEDY)[0].token_ids == second.token_ids
    assert not llm.engine.has_work()


def test_stop_strings(llm: fc.LLM) -> None:
    whole = llm.generate("hello", GREEDY)[0].text
    stop = whole[3:5]
    (output,) = llm.generate("hello", with_fields(stop=["never", stop]))
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    while llm.engine.has_work():
        llm.step()
    assert "".join(llm.stream("hello", with_fields(stop=stop))) == output.text


def test_stream_chat_and_several_answers(llm: fc.LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = llm.chat(messages, GREEDY)[0]
    assert "".join(llm.stream(messages, GREEDY)) == whole.text
    assert [output.text for output in llm.chat([messages, messages], GREEDY)] == [whole.text] * 2
    (output,) = llm.generate("hello", with_fields(n=3, temperature=1.0, seed=1))
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    stream = llm.stream("hello", with_fields(max_tokens=100))
    next(stream)
    stream.close()  # leaves nothing running
    while llm.engine.has_work():
        assert len(llm.step().outputs) <= 1


def test_logprobs(llm: fc.LLM) -> None:
    (output,) = llm.generate("hello", with_fields(logprobs=2))
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert all(len(entry.top) == 2 and entry.top[0][0] == entry.token_id for entry in output.logprobs)
    assert sum(entry.logprob for entry in output.logprobs) == pytest.approx(output.outputs[0].cumulative_logprob)


def test_finetune(llm: fc.LLM) -> None:
    rows = [{"prompt": "ab", "completion": "hello"}] * 8
    steps: list[int] = []
    config = fc.FinetuneConfig(num_epochs=4, batch_size=4, learning_rate=0.02)
    result = llm.finetune("tutor", rows, config, fc.LoraConfig(r=4), progress=lambda event: steps.append(event.step))
    assert result.job.status == "succeeded"
    assert steps == list(range(1, 9))
    assert result.losses[-1] < result.losses[0]
    base, tuned = (llm.generate("ab", GREEDY, adapter)[0].token_ids for adapter in (None, "tutor"))
    assert base != tuned
    with pytest.warns(UserWarning, match="8 truncated"):
        llm.finetune("tutor", rows, config, max_length=3)
    with pytest.raises(fc.InvalidArgument, match="exists"):
        llm.finetune("tutor", rows, config, fc.LoraConfig(r=4))


def test_refusals(llm: fc.LLM, tmp_path: Path) -> None:
    for call in (
        lambda: llm.generate([{"role": "user", "content": "x"}]),  # type: ignore[list-item]
        lambda: llm.generate("x", {"max_tokens": 3}),  # type: ignore[arg-type]
        lambda: llm.generate(["x", "y"], [GREEDY]),
        lambda: next(llm.stream("x", with_fields(n=2))),
        lambda: fc.LLM(tmp_path, fc.EngineConfig(), dtype="float32"),
        lambda: llm.finetune("other", tmp_path / "none.jsonl"),
    ):
        with pytest.raises(fc.InvalidArgument):
            call()
    assert llm.generate("x", GREEDY)[0].finish_reason == "length"
