"""Many clients at once, with a job beside them: every token arrives once, in order."""

from __future__ import annotations

import random
from pathlib import Path

from served import CHAT_ROWS, ENGINE, json_lines, serving, wait_for, write_model

import flexcore as fc
from flexcore.bench import _http
from flexcore.bench._traces import Arrival

CLIENTS = 64


def test_clients_beside_a_job(tmp_path: Path) -> None:
    llm = fc.LLM(write_model(tmp_path / "model"), **ENGINE)
    twin = fc.LLM(llm.engine.model_directory, **ENGINE)
    source = random.Random(3)
    prompts = [_http.words(source.randint(1, 8), source) for _ in range(2 * CLIENTS)]
    lengths = [source.randint(1, 40) for _ in prompts]
    sampling = [fc.SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True) for length in lengths]
    wanted = [output.text for output in twin.generate(prompts, sampling)]

    with serving(llm, tmp_path / "data") as served, served.http() as http:
        files = {"file": ("a.jsonl", json_lines(CHAT_ROWS * 8))}
        file = http.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()["id"]
        settings = {"n_epochs": 500, "batch_size": 4}
        body = {"model": "tiny", "training_file": file, "hyperparameters": settings}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        wait_for(lambda: http.get(f"/v1/fine_tuning/jobs/{job}").json()["step"] > 0)
        before = http.get(f"/v1/fine_tuning/jobs/{job}").json()["step"]
        fields = {"model": "tiny", "ignore_eos": True, "stream_options": {"include_usage": True}}
        arrivals = [Arrival(0.01 * k, 0, length) for k, length in enumerate(lengths)]
        visits = _http.send(_http.Server(served.url, fields=fields), arrivals, prompts, CLIENTS)
        assert not [visit.error for visit in visits if visit.error]
        assert [visit.text for visit in visits] == wanted
        assert [visit.tokens for visit in visits] == lengths
        wait_for(lambda: http.get(f"/v1/fine_tuning/jobs/{job}").json()["step"] > before)
        stats = served.state.runner.engine.stats()
        assert stats["requests_running"] == stats["requests_waiting"] == 0
        assert "flexcore:event_loop_lag_seconds_count" in http.get("/metrics").text
        http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert llm.engine.stats()["kv_blocks_free"] == llm.engine.stats()["kv_blocks"]
