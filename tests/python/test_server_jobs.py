"""A server and its jobs whatever happens to them: killed, paused, out of disk, with files that go."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import write_byte_tokenizer
from served import ENGINE, Process, error, json_lines, serving, wait_for, write_model

import flexcore as fc
from flexcore.server import finetuning
from flexcore.server.evaluations import Evaluations
from flexcore.server.store import Store
from flexcore.tiny import write_tiny_model

ASK = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
KILLS = int(os.environ.get("FLEXCORE_KILLS", "4"))  # 20 takes minutes
STEPS = 32 * KILLS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


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
