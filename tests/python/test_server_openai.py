"""The official client, unchanged, against flexcore serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import CHAT_ROWS, ENGINE, Served, json_lines, serving, wait_for, write_model

import flexcore as fc
from flexcore.server.errors import ApiError

ENDED = ("succeeded", "failed", "cancelled")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> fc.LLM:
    return fc.LLM(write_model(tmp_path_factory.mktemp("model")), **ENGINE)


@pytest.fixture(scope="module")
def served(llm: fc.LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(llm, tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return served.openai()


@pytest.fixture(scope="module")
def twin(llm: fc.LLM) -> fc.LLM:
    """The same model elsewhere: what answers should be."""
    return fc.LLM(llm.engine.model_directory, **ENGINE)


@pytest.fixture(scope="module")
def training_file(client: Any) -> str:
    return client.files.create(file=("train.jsonl", json_lines(CHAT_ROWS)), purpose="fine-tune").id


def ended(client: Any, job: str) -> Any:
    return wait_for(lambda: (row := client.fine_tuning.jobs.retrieve(job)).status in ENDED and row)


def hyperparameters(**values: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": values}}


@pytest.fixture(scope="module")
def tuned(client: Any, training_file: str) -> Any:
    """A job that has succeeded."""
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file,
        validation_file=training_file,
        suffix="greeter",
        seed=5,
        metadata={"team": "a"},
        method=hyperparameters(n_epochs=3, batch_size=4, learning_rate_multiplier=20),
        extra_body={"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}},
    )
    assert job.status in ("validating_files", "queued", "running") and job.fine_tuned_model is None
    return ended(client, job.id)


def test_chat(client: Any, twin: fc.LLM) -> None:
    wanted = twin.chat(HELLO, fc.SamplingParams(max_tokens=12, temperature=0.0))[0]
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.finish_reason == wanted.finish_reason
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.object, answer.model) == ("chat.completion", "tiny")


def test_completions_of_several_prompts(client: Any, twin: fc.LLM) -> None:
    sampling = fc.SamplingParams(max_tokens=7, temperature=0.0)
    prompts = ["hello", "ab", "hello"]
    wanted = [output.text for output in twin.generate(prompts, sampling)]
    answer = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=7, n=1)
    assert [choice.text for choice in answer.choices] == wanted
    ids = [twin.tokenizer.encode(prompt) for prompt in prompts]
    assert [
        c.text for c in client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=7).choices
    ] == wanted
    echoed = client.completions.create(model="tiny", prompt=ids[1], temperature=0, max_tokens=7, echo=True)
    assert echoed.choices[0].text == "ab" + wanted[1]


def test_streaming_with_stop_strings_and_n(client: Any, twin: fc.LLM) -> None:
    sampling = fc.SamplingParams(max_tokens=20, temperature=1.0, seed=11, n=4, ignore_eos=True)
    whole = [output.text for output in twin.chat(HELLO, sampling)[0].outputs]
    stop = whole[2][5:7]
    wanted = [text[: text.index(stop)] if stop in text else text for text in whole]
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=4,
        seed=11,
        stop=[stop],
        temperature=1.0,
        max_completion_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    texts, reasons, roles, usage = [""] * 4, {}, set(), None
    for chunk in stream:
        usage = chunk.usage or usage
        assert (chunk.usage is None) == bool(chunk.choices)
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                roles.add(choice.index)
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == wanted and roles == {0, 1, 2, 3}
    assert reasons == {k: "stop" if stop in whole[k] else "length" for k in range(4)}
    assert usage.completion_tokens <= 80 and usage.prompt_tokens == len(twin.tokenizer.encode_chat(HELLO))


def test_logprobs(client: Any, twin: fc.LLM) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_completion_tokens=3, logprobs=True, top_logprobs=2
    )
    prompt = twin.tokenizer.encode_chat(HELLO)
    wanted = twin.generate(prompt, fc.SamplingParams(max_tokens=3, temperature=0.0, logprobs=2))[0]
    content = answer.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([entry.logprob for entry in wanted.logprobs], abs=1e-4)
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    assert (
        bytes(b for entry in content for b in entry.bytes).decode(errors="replace") == answer.choices[0].message.content
    )
    plain = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=3, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([entry.logprob for entry in wanted.logprobs], abs=1e-4)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)  # by text, half characters by their bytes


def test_a_job_from_file_to_model(client: Any, tuned: Any, training_file: str) -> None:
    assert tuned.status == "succeeded", tuned.error
    assert tuned.fine_tuned_model.startswith("ft:tiny:greeter:")
    assert tuned.trained_tokens > 0 and tuned.finished_at >= tuned.created_at
    assert (tuned.hyperparameters.n_epochs, tuned.seed, tuned.metadata) == (3, 5, {"team": "a"})
    assert (tuned.training_file, tuned.organization_id, tuned.error) == (training_file, "org-flexcore", None)
    events = list(client.fine_tuning.jobs.list_events(tuned.id, limit=4))  # paged by the client
    assert len({event.id for event in events}) == len(events)
    losses = [
        event.data["train_loss"] for event in reversed(events) if event.type == "metrics" and "train_loss" in event.data
    ]
    assert len(losses) == 9 and losses[-1] < losses[0]
    assert events[-1].message.startswith("Created fine-tuning job")
    assert "successfully completed" in events[0].message
    (results,) = tuned.result_files
    lines = client.files.content(results).text.splitlines()
    assert lines[0].startswith("step,train_loss") and len(lines) == 10
    assert float(lines[1].split(",")[1]) == pytest.approx(losses[0])


def test_validation_loss_is_that_of_the_adapter(client: Any, served: Served, tuned: Any, twin: fc.LLM) -> None:
    checkpoints = client.fine_tuning.jobs.checkpoints.list(tuned.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [9, 6, 3]
    examples = twin.load_dataset(CHAT_ROWS).examples
    for checkpoint in checkpoints:
        row = served.state.store.get("models", checkpoint.fine_tuned_model_checkpoint)
        twin.engine.load_adapter("x", served.state.store.directory / "adapters" / row["directory"])
        total, targets = 0.0, 0
        for example in examples:
            scores = twin.engine.score(example.input_ids, "x")
            kept = [score for score, label in zip(scores, example.labels[1:], strict=True) if label != -100]
            total, targets = total - sum(kept), targets + len(kept)
        assert checkpoint.metrics.full_valid_loss == pytest.approx(total / targets, rel=1e-4)
        twin.engine.unload_adapter("x")
    losses = [checkpoint.metrics.full_valid_loss for checkpoint in checkpoints]
    assert losses == sorted(losses)  # newest first: it learns


def test_answers_of_a_finetuned_model_while_the_next_one_trains(
    client: Any, served: Served, tuned: Any, twin: fc.LLM, training_file: str
) -> None:
    store = served.state.store
    twin.engine.load_adapter(
        "tuned", store.directory / "adapters" / store.get("models", tuned.fine_tuned_model)["directory"]
    )
    sampling = fc.SamplingParams(max_tokens=12, temperature=0.0)
    wanted = twin.chat(HELLO, sampling, adapter="tuned")[0].text
    assert wanted != twin.chat(HELLO, sampling)[0].text
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, method=hyperparameters(n_epochs=400, batch_size=2)
    )
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).to_dict()["step"] > 1)
    ask = {"messages": HELLO, "temperature": 0, "max_completion_tokens": 12}
    assert client.chat.completions.create(model=tuned.fine_tuned_model, **ask).choices[0].message.content == wanted
    first = client.fine_tuning.jobs.checkpoints.list(tuned.id).data[-1].fine_tuned_model_checkpoint
    assert first == tuned.fine_tuned_model + "@3"
    client.chat.completions.create(model=first, **ask)

    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.estimated_finish is not None
    paused = client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "queued" and paused.to_dict()["paused"]
    step = client.fine_tuning.jobs.retrieve(job.id).to_dict()["step"]
    client.chat.completions.create(model="tiny", **ask)
    assert client.fine_tuning.jobs.retrieve(job.id).to_dict()["step"] == step
    with pytest.raises(openai.BadRequestError, match="can't be paused"):
        client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).to_dict()["step"] > step)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).finished_at is not None
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.fine_tuning.jobs.cancel(job.id)
    for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data:
        client.models.delete(checkpoint.fine_tuned_model_checkpoint)


def test_lists(client: Any, tuned: Any, training_file: str) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "tiny" and tuned.fine_tuned_model in names
    assert client.models.retrieve(tuned.fine_tuned_model).owned_by == "flexcore"
    jobs = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    assert tuned.id in jobs and len(set(jobs)) == len(jobs)
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [tuned.id]
    assert not client.fine_tuning.jobs.list(metadata={"team": "b"}).data
    assert training_file in [file.id for file in client.files.list(purpose="fine-tune", limit=1)]
    assert client.files.content(training_file).content == json_lines(CHAT_ROWS)
    assert client.files.retrieve(training_file).bytes == len(json_lines(CHAT_ROWS))


def test_deleting(client: Any, served: Served, training_file: str) -> None:
    file = client.files.create(file=("short.jsonl", json_lines(CHAT_ROWS[:2])), purpose="fine-tune").id
    job = ended(
        client, client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 1}).id
    )
    asked = served.state.models.resolve(job.fine_tuned_model)
    assert client.models.delete(job.fine_tuned_model).deleted
    assert asked.load is not None
    with pytest.raises(ApiError, match="does not exist"):  # who asked just before
        asked.load()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model=job.fine_tuned_model, messages=HELLO)
    assert client.files.delete(file).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def test_a_corrupt_line_is_named_and_costs_nobody_else(client: Any) -> None:
    content = json_lines(CHAT_ROWS[:2]) + b'{"messages": [{"role": "user"\n' + json_lines(CHAT_ROWS[2:])
    file = client.files.create(file=("broken.jsonl", content), purpose="fine-tune").id
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=file).id)
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert job.error.message.startswith("broken.jsonl:3: ")
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=2).choices


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "gpt-4"}, "model", "gpt-4"),
        ({"training_file": "file-none"}, "training_file", "no file"),
        ({"suffix": "a b"}, "suffix", "letters"),
        ({"method": {"type": "dpo"}}, "method.type", "supervised"),
        ({"method": hyperparameters(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs", "auto"),
        ({"extra_body": {"lora": {"r": 0}}}, "lora.r", "greater"),
        ({"extra_body": {"lora": {"rank": 4}}}, "lora.rank", "Unrecognized"),
        ({"extra_body": {"peft": {"peft_type": "LOHA"}}}, "peft", "PROMPT_TUNING"),
        ({"extra_body": {"peft": {"peft_type": "IA3", "r": 4}}}, "peft", "feedforward_modules"),
        ({"extra_body": {"peft": {"peft_type": "IA3"}, "lora": {}}}, "peft", "one of them"),
        ({"extra_body": {"epochs": 4}}, "epochs", "Unrecognized"),
        ({"metadata": {str(k): "v" for k in range(17)}}, "metadata", "at most"),
    ],
)
def test_jobs_that_are_refused(
    client: Any, training_file: str, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as info:
        client.fine_tuning.jobs.create(**({"model": "tiny", "training_file": training_file} | fields))
    assert info.value.param.startswith(param)


@pytest.mark.parametrize("method", [{"peft_type": "ia3"}, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}])
def test_jobs_of_other_methods(client: Any, training_file: str, method: dict[str, Any]) -> None:
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training_file, method=hyperparameters(n_epochs=1), extra_body={"peft": method}
    )
    assert job.peft == method and job.lora is None
    job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=HELLO, max_completion_tokens=4)
    assert answer.usage.completion_tokens > 0


def test_an_objective_by_request_and_a_weight_by_job(llm: fc.LLM, tmp_path: Path) -> None:
    own = fc.LLM(llm.engine.model_directory, slo_classes={"batch": fc.SLO(1e6, 1e6)}, **ENGINE)
    with serving(own, tmp_path) as served:
        client = served.openai()
        file = client.files.create(file=("train.jsonl", json_lines(CHAT_ROWS)), purpose="fine-tune").id
        options = {"training": {"weight": 3.0, "optimizer": "sgd", "lr_scheduler": "cosine"}}
        method = hyperparameters(n_epochs=2, batch_size=4)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, method=method, extra_body=options)
        for _ in range(2):
            client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"slo_class": "batch"})
        assert ended(client, job.id).status == "succeeded"
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        rates = [event.data["learning_rate"] for event in events if event.type == "metrics"][::-1]
        assert len(rates) == 6 and rates == sorted(rates, reverse=True) and rates[0] > 10 * rates[-1]  # a cosine
        stats = own.engine.stats()
        assert (stats["slo.batch.requests"], stats["slo.batch.kept"]) == (2, 2)
        assert stats.get("slo.default.requests", 0) == 0


def test_adapters_that_are_loaded(client: Any, served: Served, twin: fc.LLM, tmp_path: Path) -> None:
    twin.engine.create_adapter("a", fc.LoraConfig(r=2), seed=3)
    twin.engine.save_adapter("a", tmp_path / "a")
    with served.http() as http:
        body = {"lora_name": "a", "lora_path": str(tmp_path / "a")}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
        assert client.chat.completions.create(model="a", messages=HELLO, max_completion_tokens=2).model == "a"
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 200
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404
        body = {"lora_name": "b", "lora_path": str(tmp_path / "none")}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 400
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="a", messages=HELLO)


def test_tokenize(served: Served, twin: fc.LLM) -> None:
    with served.http() as http:
        assert http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"] == twin.tokenizer.encode("hello")
        answer = http.post("/tokenize", json={"messages": HELLO, "return_token_strs": True}).json()
        assert answer["tokens"] == twin.tokenizer.encode_chat(HELLO) and answer["count"] == len(answer["token_strs"])
        text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"]
        assert text == twin.tokenizer.apply_chat_template(HELLO)
