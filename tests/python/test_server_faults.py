"""What a server is sent, by mistake or on purpose."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import ENGINE, Served, error, serving, wait_for, write_model

import flexcore as fc

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
