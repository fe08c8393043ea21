"""fc.LLM: text in, text out, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore.tiny import write_tiny_model

GREEDY = fc.SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
ROWS = [{"prompt": "ab", "completion": "hello"}] * 8


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


def test_an_answer_that_fails_says_why(llm: fc.LLM) -> None:
    barred = {token: -float("inf") for token in range(llm.engine.model().vocab_size)}
    params = [fc.SamplingParams(max_tokens=4, logit_bias=barred), fc.SamplingParams(max_tokens=4, ignore_eos=True)]
    failed, sound = (output.outputs[0] for output in llm.generate(["a", "b"], params))
    assert failed.finish_reason == "error" and "no token left" in failed.error and failed.token_ids == []
    assert sound.finish_reason == "length" and sound.error == "" and sound.ttft_ms > 0


def test_stop_strings_wait_for_min_tokens(llm: fc.LLM) -> None:
    letters = {token: 100.0 for token in map(llm.tokenizer.token_id, "abcxyz") if token is not None}
    (whole,) = llm.generate("hello", with_fields(logit_bias=letters))
    assert set(whole.text) <= set("abcxyz")
    for count in (1, 5, 12):
        (output,) = llm.generate("hello", with_fields(logit_bias=letters, stop=list("abcxyz"), min_tokens=count))
        assert output.text == whole.text[:count]
        assert output.finish_reason == ("length" if count == 12 else "stop")


def test_the_tokenizers_end_of_turn_ends_an_answer(tmp_path: Path) -> None:
    """config.json names another end of sequence, as in many chat models that were finetuned from a base model."""
    directory = write_byte_tokenizer(write_tiny_model(tmp_path, vocab_size=272))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    llm = fc.LLM(directory, dtype="float32", max_model_len=64, max_num_seqs=2)
    assert llm.engine.model().eos_token_ids == [0]
    end = llm.tokenizer.eos_token_id
    assert end is not None
    messages = [{"role": "user", "content": "hi"}]
    sampling = fc.SamplingParams(max_tokens=6, temperature=0.0, logit_bias={end: 1e4})
    (output,) = llm.chat(messages, sampling)
    assert (output.finish_reason, output.token_ids, output.text) == ("stop", [end], "")
    assert sampling.stop_token_ids == []
    sampling.ignore_eos = True
    assert llm.chat(messages, sampling)[0].finish_reason == "length"


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
    steps: list[int] = []
    config = fc.FinetuneConfig(num_epochs=4, batch_size=4, learning_rate=0.02)
    result = llm.finetune("tutor", ROWS, config, fc.LoraConfig(r=4), progress=lambda event: steps.append(event.step))
    assert result.job.status == "succeeded"
    assert steps == list(range(1, 9))
    assert result.losses[-1] < result.losses[0]
    base, tuned = (llm.generate("ab", GREEDY, adapter)[0].token_ids for adapter in (None, "tutor"))
    assert base != tuned
    with pytest.warns(UserWarning, match="8 truncated"):
        llm.finetune("tutor", ROWS, config, max_length=3)
    with pytest.raises(fc.InvalidArgument, match="exists"):
        llm.finetune("tutor", ROWS, config, fc.LoraConfig(r=4))


def test_an_interrupted_finetune_leaves_no_job(llm: fc.LLM) -> None:
    def interrupt(event: fc.FinetuneEvent) -> None:
        raise KeyboardInterrupt

    config = fc.FinetuneConfig(batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        llm.finetune("interrupted", ROWS, config, progress=interrupt)
    job = llm.engine.jobs()[-1]
    assert (job.adapter, job.status, job.step) == ("interrupted", "cancelled", 1)
    assert llm.finetune("interrupted", ROWS, config).job.status == "succeeded"


def test_a_refused_finetune_leaves_no_adapter(llm: fc.LLM) -> None:
    lora = fc.LoraConfig(r=2)
    with pytest.raises(fc.InvalidArgument, match="num_epochs"):
        llm.finetune("refused", ROWS, fc.FinetuneConfig(num_epochs=0), lora)
    assert "refused" not in {adapter.name for adapter in llm.engine.adapters()}
    assert llm.finetune("refused", ROWS, fc.FinetuneConfig(), lora).job.status == "succeeded"
    with pytest.raises(fc.InvalidArgument, match="num_epochs"):
        llm.finetune("refused", ROWS, fc.FinetuneConfig(num_epochs=0))
    assert "refused" in {adapter.name for adapter in llm.engine.adapters()}  # it was there before


def test_a_paused_job_is_not_waited_for(llm: fc.LLM) -> None:
    def pause(event: fc.FinetuneEvent) -> None:
        if event.step == 2:
            llm.engine.pause_job(event.job_id)

    with pytest.raises(fc.InvalidArgument, match=r"job: got \d+ on 'paused', which is paused.*resume_job") as raised:
        llm.finetune("paused", ROWS, fc.FinetuneConfig(batch_size=2), progress=pause)
    job = llm.engine.jobs()[-1]
    assert (job.status, job.step) == ("paused", 2)
    assert f"resume_job({job.id})" in str(raised.value)
    llm.engine.resume_job(job.id)
    result = llm.wait(job.id)
    assert (result.job.status, [event.step for event in result.events if event.target_tokens]) == ("succeeded", [3, 4])


def test_refusals(llm: fc.LLM, tmp_path: Path) -> None:
    for call in (
        lambda: llm.generate([{"role": "user", "content": "x"}]),  # type: ignore[list-item]
        lambda: llm.generate("x", {"max_tokens": 3}),  # type: ignore[arg-type]
        lambda: llm.generate(["x", "y"], [GREEDY]),
        lambda: next(llm.stream("x", with_fields(n=2))),
        lambda: fc.LLM(tmp_path, fc.EngineConfig(), dtype="float32"),
        lambda: llm.finetune("other", tmp_path / "none.jsonl"),
        lambda: llm.load_dataset(ROWS, max_length=0),
    ):
        with pytest.raises(fc.InvalidArgument):
            call()
    assert llm.generate("x", GREEDY)[0].finish_reason == "length"
