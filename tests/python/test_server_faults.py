"""What a server is sent, by mistake or on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import write_byte_tokenizer
from served import ENGINE, Process, Served, json_lines, serving, wait_for, write_model

import flexcore as fc
from flexcore.server import finetuning
from flexcore.server.evaluations import Evaluations
from flexcore.server.store import Store
from flexcore.tiny import write_tiny_model

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
KEY = {"Authorization": "Bearer right"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits: dict[str, Any] = {"max_waiting": 40, "max_body_bytes": 1 << 20, "max_file_bytes": 1 << 20}
    llm = fc.LLM(model, **ENGINE)
    with serving(llm, tmp_path_factory.mktemp("data"), api_keys=("right", "other"), **limits) as server:
        yield server


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.http(headers=KEY) as client:
        yield client


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return body


def idle(served: Served) -> bool:
    stats = served.state.runner.engine.stats()
    return stats["kv_blocks_free"] == stats["kv_blocks"] and served.state.runner.num_pending == 0


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Bearer"}]
)
def test_keys(served: Served, header: dict[str, str]) -> None:
    with served.http(headers=header) as http:
        assert error(http.get("/v1/models"), 401)["code"] == "invalid_api_key"
        error(http.post("/v1/completions", json=ASK), 401)
        assert http.get("/health").status_code == 200
        assert http.get("/version").json() == {"version": fc.__version__}
    with served.http(headers={"Authorization": "Bearer other"}) as http:
        assert http.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**ASK, "temperature": -1}, "temperature"),
        ({**ASK, "top_p": "x"}, "top_p"),
        ({**ASK, "n": 0}, "n"),
        ({**ASK, "max_tokens": 0}, "max_tokens"),
        ({**ASK, "prompt": []}, "prompt"),
        ({**ASK, "prompt": ""}, "prompt"),
        ({**ASK, "prompt": [5, 272]}, "prompt"),
        ({**ASK, "prompt": [-1]}, "prompt"),
        ({**ASK, "prompt": {"a": 1}}, "prompt"),
        ({**ASK, "prompt": "a" * 300}, "prompt"),
        ({**ASK, "stop": [""]}, "stop"),
        ({**ASK, "logit_bias": {"x": 1}}, "logit_bias"),
        ({**ASK, "logprobs": -1}, "logprobs"),
        ({**ASK, "suffix": "x"}, "suffix"),
        ({**ASK, "temprature": 1}, "temprature"),
        ({**ASK, "slo_class": "none"}, "slo_class"),
        ({"prompt": "a"}, "model"),
        ({**ASK, "model": 7}, "model"),
    ],
)
def test_bad_fields_are_named(http: httpx.Client, served: Served, body: dict[str, Any], param: str) -> None:
    found = error(http.post("/v1/completions", json=body), 400)
    assert found["param"] is not None and found["param"].startswith(param)
    wait_for(lambda: idle(served))


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages"),
    ],
)
def test_bad_messages_are_named(http: httpx.Client, messages: Any, param: str) -> None:
    content = json.dumps({"model": "tiny", "messages": messages}).encode()
    found = error(http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}), 400)
    assert found["param"] == param


def test_what_is_no_request(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"model": NaN'):
        error(http.post("/v1/completions", content=content, headers=headers), 400)
    error(http.get("/v1/nothing"), 404)
    error(http.get("/v1/completions"), 405)
    assert error(http.post("/v1/completions", json={**ASK, "model": "gone"}), 404)["code"] == "model_not_found"
    for path in (
        "/v1/files/x",
        "/v1/files/x/content",
        "/v1/fine_tuning/jobs/x",
        "/v1/models/x",
        "/v1/fine_tuning/jobs/x/events",
    ):
        error(http.get(path), 404)
    for verb in ("cancel", "pause", "resume"):
        error(http.post(f"/v1/fine_tuning/jobs/x/{verb}"), 404)
    error(http.post("/v1/files", data={"purpose": "fine-tune"}), 400)
    error(http.post("/v1/files", files={"file": ("a.jsonl", b"")}, data={"purpose": "fine-tune"}), 400)
    error(http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "world domination"}), 400)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("fine_tuning/jobs", {"model": "tiny", "training_file": "x", "metadata": {"k": "\ud83d"}}, "metadata"),
        ("fine_tuning/jobs", {"model": "tiny", "training_file": "x", "peft": {"target_modules": ["\ud83d"]}}, "peft"),
        ("completions", ASK | {"stop": ["\ud83d"]}, "stop"),
        ("completions", ASK | {"model": "\ud83d"}, "model"),
        ("load_lora_adapter", {"lora_name": "x", "lora_path": "\ud83d"}, "lora_path"),
    ],
)
def test_half_a_surrogate_pair(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused = error(http.post(f"/v1/{path}", content=json.dumps(body), headers=headers), 400)
    assert refused["param"] == param and "surrogate" in refused["message"]
    assert http.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_a_method_with_a_field_of_python(http: httpx.Client) -> None:
    file = http.post("/v1/files", files={"file": ("a.jsonl", b'{"text": "a"}')}, data={"purpose": "fine-tune"}).json()
    body = {"model": "tiny", "training_file": file["id"], "peft": {"peft_type": "IA3", "self": 1}}
    assert error(http.post("/v1/fine_tuning/jobs", json=body), 400)["param"] == "peft"


def test_files_deleted_as_they_are_listed(http: httpx.Client) -> None:
    for k in range(5):
        file = {"file": (f"{k}.jsonl", b'{"text": "a"}')}
        http.post("/v1/files", files=file, data={"purpose": "fine-tune"})
    count, after = 0, ""
    while True:  # as the client's iterator
        page = http.get("/v1/files", params={"limit": 2} | ({"after": after} if after else {})).json()
        for row in page["data"]:
            assert http.delete(f"/v1/files/{row['id']}").status_code == 200
        count += len(page["data"])
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert count >= 5 and http.get("/v1/files").json()["data"] == []


def test_bodies_that_are_too_large(http: httpx.Client, served: Served) -> None:
    large = b'{"prompt": "' + b"a" * (100 << 20)
    headers = {"Content-Type": "application/json"}
    pieces = (b"a" * 65536 for _ in range(64))  # no length is given
    hung_up = contextlib.suppress(httpx.TransportError)  # it answered before everything was sent
    with hung_up:
        error(http.post("/v1/completions", content=large, headers=headers), 413)
    with hung_up:
        error(http.post("/v1/completions", content=pieces, headers=headers), 413)
    with hung_up:
        file = {"file": ("a.jsonl", b"a" * (2 << 20))}
        error(http.post("/v1/files", files=file, data={"purpose": "fine-tune"}), 413)
    assert http.post("/v1/completions", json=ASK).status_code == 200
    assert not list((served.state.store.directory / "files").iterdir())


def test_more_requests_than_there_is_room_for(served: Served) -> None:
    with served.http(headers=KEY, limits=httpx.Limits(max_connections=200)) as http, ThreadPoolExecutor(100) as pool:
        answers: list[httpx.Response] = []
        refused: list[httpx.Response] = []
        while not refused and len(answers) < 1000:  # on a busy machine the first may end before the last arrive
            answers += pool.map(lambda _: http.post("/v1/completions", json=LONG), range(100))
            refused = [answer for answer in answers if answer.status_code == 429]
        assert 0 < len(refused) < len(answers)
        for answer in answers:
            if answer.status_code == 429:
                assert error(answer, 429)["type"] == "rate_limit_error" and answer.headers["retry-after"]
            else:
                assert answer.json()["usage"]["completion_tokens"] == 100
        assert error(http.post("/v1/completions", json={**LONG, "n": 41}), 400)["param"] == "n"
        text = http.get("/metrics").text
    labels = '{engine="0",model_name="tiny",reason="too_many_requests"}'
    assert f"flexcore:admission_rejections_total{labels} {len(refused)}" in text
    wait_for(lambda: idle(served))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(served: Served, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream, "n": 8}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_for(lambda: served.state.runner.engine.stats()["requests_running"] > 0, every=0.001)  # not for long
            if stream:
                connection.recv(100)
        wait_for(lambda: idle(served), seconds=5)


def test_metrics(http: httpx.Client) -> None:
    http.post("/v1/completions", json={**LONG, "n": 2})
    lines = http.get("/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    labels = '{engine="0",model_name="tiny"}'
    for name in (
        *(
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens_total",
            "generation_tokens_total",
        ),
        *(
            "num_preemptions_total",
            "prefix_cache_queries_total",
            "time_to_first_token_seconds_count",
            "e2e_request_latency_seconds_count",
        ),
        *(
            "inter_token_latency_seconds_sum",
            "request_time_per_output_token_seconds_count",
            "request_queue_time_seconds_count",
        ),
        *(
            "iteration_tokens_total_count",
            "request_params_n_count",
            "finetune_throttled_seconds_total",
            "finetune_tokens_per_second",
        ),
    ):
        assert f"flexcore:{name}{labels}" in values, name
    assert values[f"flexcore:generation_tokens_total{labels}"] >= 200
    assert values['flexcore:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'] >= 2
    assert values['flexcore:slo_violations_total{engine="0",kind="tpot",model_name="tiny",slo_class="default"}'] >= 0


def test_the_page(served: Served) -> None:
    with served.http() as http:
        page = http.get("/")
        assert page.status_code == 200 and "<title>flexcore</title>" in page.text
        assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "") and "https://" not in page.text
    with served.http(headers=KEY) as http:
        status = http.get("/v1/flexcore/status").json()
    assert status["model"] == "tiny" and status["memory"]["weights"] > 0 and status["slo"]["tpot_ms"] == 100


KILLS = int(os.environ.get("FLEXCORE_KILLS", "4"))  # 20 takes minutes
STEPS = 32 * KILLS


def train(http: httpx.Client, epochs: int = STEPS // 4) -> str:
    """A job of `epochs` times 4 steps."""
    rows = [{"text": f"{k} sheep " * 12} for k in range(64)]
    file = http.post("/v1/files", files={"file": ("a.jsonl", json_lines(rows))}, data={"purpose": "fine-tune"})
    body = {"model": "tiny", "training_file": file.json()["id"], "seed": 3}
    settings = {"hyperparameters": {"n_epochs": epochs, "batch_size": 16}}
    answer = http.post("/v1/fine_tuning/jobs", json={**body, "method": {"type": "supervised", "supervised": settings}})
    return str(answer.json()["id"])


def losses(http: httpx.Client, job: str) -> list[tuple[int, float]]:
    events = http.get(f"/v1/fine_tuning/jobs/{job}/events?limit=9999").json()["data"]
    metrics = [event["data"] for event in reversed(events) if event["type"] == "metrics"]
    return [(data["step"], data["train_loss"]) for data in metrics]


def job_row(http: httpx.Client, job: str) -> dict[str, Any]:
    return dict(http.get(f"/v1/fine_tuning/jobs/{job}").json())


def wait_for_step(http: httpx.Client, job: str, step: int) -> None:
    wait_for(lambda: job_row(http, job)["step"] >= step)


def wait_for_success(http: httpx.Client, job: str) -> None:
    row = wait_for(lambda: (r := job_row(http, job))["status"] in ("succeeded", "failed") and r)
    assert row["status"] == "succeeded", row["error"]


def test_kill_9_at_any_moment(model: Path, tmp_path: Path) -> None:
    """Killed again and again: the job ends as if nothing had been, every step is there once, and no file is half."""
    with serving(fc.LLM(model, **ENGINE), tmp_path / "whole") as whole, whole.http() as http:
        job = train(http)
        wait_for_success(http, job)
        wanted = losses(http, job)
    assert [step for step, _ in wanted] == list(range(1, STEPS + 1))

    data, job, repeated, seen = tmp_path / "killed", "", 0, 0
    for kill in range(KILLS + 1):
        process = Process(model, data, log=tmp_path / "log")
        with process.served.http() as http:
            job = job or train(http)
            made = losses(http, job)
            assert [step for step, _ in made] == list(range(1, len(made) + 1))
            repeated += max(0, seen - len(made))
            if kill == KILLS:
                wait_for_success(http, job)
                break
            wait_for_step(http, job, 25 * (kill + 1))
            time.sleep(0.013 * (kill % 9))
            seen = len(losses(http, job))
        process.kill()
    with process.served.http() as http:
        made = losses(http, job)
        assert [step for step, _ in made] == list(range(1, STEPS + 1))
        assert [loss for _, loss in made] == pytest.approx([loss for _, loss in wanted], rel=1e-4)
        print(f"{KILLS} kills, {repeated} of {STEPS} steps repeated")
        assert repeated <= STEPS / 20
        name = job_row(http, job)["fine_tuned_model"]
        ask = {"model": name, "prompt": "hello", "temperature": 0, "max_tokens": 4}
        assert http.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"] > 0
    assert process.end() == 0
    assert not list((data / "jobs").iterdir())


def test_the_end_waits_for_requests_and_keeps_jobs(model: Path, tmp_path: Path) -> None:
    process = Process(model, tmp_path / "data", log=tmp_path / "log")
    with process.served.http() as http, ThreadPoolExecutor(1) as pool:
        job = train(http, epochs=900)
        wait_for(lambda: http.get(f"/v1/fine_tuning/jobs/{job}").json()["step"] > 3)
        answer = pool.submit(http.post, "/v1/completions", json=LONG)
        time.sleep(0.05)
        assert process.end() == 0
        assert answer.result().json()["usage"]["completion_tokens"] == 100
    process = Process(model, tmp_path / "data", log=tmp_path / "log")
    with process.served.http() as http:
        row = wait_for(lambda: (r := http.get(f"/v1/fine_tuning/jobs/{job}").json())["status"] == "running" and r)
        assert row["step"] >= 3
        steps = [step for step, _ in losses(http, job)]
        assert steps == list(range(1, len(steps) + 1))
        assert http.post(f"/v1/fine_tuning/jobs/{job}/cancel").json()["status"] == "cancelled"
    assert process.end() == 0


def test_a_data_directory_is_one_processs(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("adapters/mine", "jobs/mine", "files"):
        (data / name).mkdir(parents=True)
    (data / "files" / "notes.txt").write_text("not the store's")
    with serving(fc.LLM(model, **ENGINE), data) as served:
        with pytest.raises(fc.Error, match="another process"):
            Store(data)
        file = served.state.store.add_file(b"{}", "a.jsonl", "fine-tune")
    stray = data / "files" / ("file-" + 24 * "0" + ".jsonl")
    stray.write_text("of a write that was cut short")
    with contextlib.closing(Store(data)) as store:
        assert store.path_of_file(file).read_text() == "{}"
    assert not stray.exists() and (data / "files" / "notes.txt").exists() and (data / "adapters" / "mine").exists()


def test_another_models_jobs_and_adapters_wait_for_it(model: Path, tmp_path: Path) -> None:
    other = write_byte_tokenizer(write_tiny_model(tmp_path / "other", seed=1, vocab_size=272))
    data = tmp_path / "data"
    with serving(fc.LLM(model, **ENGINE), data) as served, served.http() as http:
        job = train(http, epochs=1)
        wait_for_success(http, job)
        tuned = job_row(http, job)["fine_tuned_model"]
        running = train(http, epochs=900)
        wait_for_step(http, running, 3)
    with serving(fc.LLM(other, **ENGINE), data) as served, served.http() as http:
        assert tuned not in [row["id"] for row in http.get("/v1/models").json()["data"]]
        error(http.post("/v1/completions", json={**ASK, "model": tuned}), 404)
        assert job_row(http, running)["step"] >= 3 and not served.state.runner.engine.jobs()
    with serving(fc.LLM(model, **ENGINE), data, served_names=("renamed",)) as served, served.http() as http:
        step = job_row(http, running)["step"]
        wait_for_step(http, running, step + 2)
        assert http.post("/v1/completions", json={**ASK, "model": tuned}).status_code == 200
        assert http.post(f"/v1/fine_tuning/jobs/{running}/cancel").json()["status"] == "cancelled"
        assert served.state.runner.engine.memory()["optimizer"] == 0


def test_storage_that_fails_pauses_a_job(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fc.LLM(model, **ENGINE), tmp_path / "data") as served, served.http() as http:
        job = train(http)
        wait_for_step(http, job, 2)
        update = served.state.store.update

        def full(table: str, key: str, **changes: Any) -> None:
            if "trained_tokens" in changes:
                raise OSError(28, "No space left on device")
            update(table, key, **changes)

        monkeypatch.setattr(served.state.store, "update", full)
        wait_for(lambda: job_row(http, job)["paused"])
        assert http.post("/v1/completions", json=ASK).status_code == 200
        assert "No space left" in http.get(f"/v1/fine_tuning/jobs/{job}/events").json()["data"][0]["message"]
        monkeypatch.undo()
        http.post(f"/v1/fine_tuning/jobs/{job}/resume")
        wait_for_success(http, job)
        assert [step for step, _ in losses(http, job)] == list(range(1, STEPS + 1))


def test_a_job_waits_for_room_in_the_database(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "RETRY_SECONDS", 0.1)
    with serving(fc.LLM(model, **ENGINE), tmp_path / "data") as served, served.http() as http:
        store, refused = served.state.store, threading.Event()
        update = store.update

        def full(table: str, key: str, **changes: Any) -> None:
            if changes.get("status") == "queued":
                refused.set()
                raise sqlite3.OperationalError("database or disk is full")
            update(table, key, **changes)

        monkeypatch.setattr(store, "update", full)
        job = train(http)
        assert refused.wait(60)
        assert job_row(http, job)["status"] == "validating_files"
        monkeypatch.setattr(store, "update", update)
        wait_for_success(http, job)

        def none(*_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(store, "insert", none)
        file = {"file": ("a.jsonl", b'{"text": "a"}')}
        assert error(http.post("/v1/files", files=file, data={"purpose": "fine-tune"}), 507)["code"] == "storage"


def test_no_token_waits_for_a_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a job are written beside the steps: with a disk that hangs, requests are answered and the job trains."""
    hangs, written = threading.Event(), threading.Event()
    save = fc.JobSnapshot.save_checkpoint

    def slow(snapshot: fc.JobSnapshot, directory: Path) -> None:
        written.set()
        assert hangs.wait(60)
        save(snapshot, directory)

    monkeypatch.setattr(fc.JobSnapshot, "save_checkpoint", slow)
    with serving(fc.LLM(model, **ENGINE), tmp_path / "data") as served, served.http() as http:
        job = train(http, epochs=900)
        assert written.wait(60)
        step = job_row(http, job)["step"]
        wait_for_step(http, job, step + 3)
        assert http.post("/v1/completions", json=ASK).status_code == 200
        hangs.set()
        assert http.post(f"/v1/fine_tuning/jobs/{job}/pause").json()["paused"]
        http.post(f"/v1/fine_tuning/jobs/{job}/resume")
        wait_for_step(http, job, job_row(http, job)["step"] + 2)
        assert http.post(f"/v1/fine_tuning/jobs/{job}/cancel").json()["status"] == "cancelled"
        wait_for(lambda: not list((tmp_path / "data" / "jobs").iterdir()))


def test_a_checkpoint_that_is_gone_before_its_evaluation(model: Path, tmp_path: Path) -> None:
    """Costs its validation loss, and the job nothing."""
    engine, store = fc.LLM(model, **ENGINE).engine, Store(tmp_path / "data")
    evaluations = Evaluations(engine, store, "job", [fc.Example([1, 2, 3], [1, 2, 3])], 128)
    evaluations.add("name", "checkpoint", 3)
    evaluations.go_on(nobody=True)
    assert not evaluations and engine.adapters() == []
    (event,) = store.select("SELECT * FROM events WHERE job = ?", "job")
    assert event["level"] == "warn" and event["message"].startswith("Step 3: the validation loss can't be computed: ")
    store.close()


def test_rows_are_cut_where_virtual_tokens_leave_no_room(model: Path, tmp_path: Path) -> None:
    rows = json_lines([{"text": f"{k} sheep " * 40} for k in range(4)])  # longer than the model holds
    with serving(fc.LLM(model, **ENGINE), tmp_path / "data") as served, served.http() as http:
        upload = {"files": {"file": ("a.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
        file = http.post("/v1/files", **upload).json()["id"]
        peft = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}
        body = {"model": "tiny", "training_file": file, "validation_file": file, "peft": peft}
        job = http.post("/v1/fine_tuning/jobs", json=body | {"hyperparameters": {"n_epochs": 1}}).json()["id"]
        wait_for_success(http, job)
        (checkpoint,) = http.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"]
        assert checkpoint["metrics"]["full_valid_loss"] > 0


def test_pause_at_any_moment(model: Path, tmp_path: Path) -> None:
    with serving(fc.LLM(model, **ENGINE), tmp_path / "data", max_finetune_jobs=1) as served, served.http() as http:
        first, second = train(http), train(http)
        for turn in range(4):  # the one trains, the other waits in line
            for job in (second, first):
                assert job_row(http, http.post(f"/v1/fine_tuning/jobs/{job}/pause").json()["id"])["paused"]
                error(http.post(f"/v1/fine_tuning/jobs/{job}/pause"), 400)
            assert not served.state.runner.engine.has_work()
            for job in (first, second):
                assert not http.post(f"/v1/fine_tuning/jobs/{job}/resume").json()["paused"]
                error(http.post(f"/v1/fine_tuning/jobs/{job}/resume"), 400)
            time.sleep(0.4 * turn)
        for job in (first, second):
            wait_for_success(http, job)
            assert [step for step, _ in losses(http, job)] == list(range(1, STEPS + 1))
        both = [[loss for _, loss in losses(http, job)] for job in (first, second)]
        assert both[0] == pytest.approx(both[1], rel=1e-4)
