"""A load on an OpenAI-compatible server, flexcore's or another, in the keys of `vllm bench serve`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from flexcore import InvalidArgument
from flexcore.bench import _http, _measure, _traces
from flexcore.bench._client import summary
from flexcore.bench._traces import Arrival
from flexcore.cli import options
from flexcore.cli.console import err, out, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument("--endpoint", default="/v1/completions", help="or /v1/chat/completions")
    parser.add_argument("--api-key", default=os.environ.get("FLEXCORE_API_KEY"), metavar="KEY")
    parser.add_argument("--num-prompts", type=options.positive, default=100, metavar="N")
    parser.add_argument("--request-rate", type=float, default=float("inf"), metavar="PER_S", help="inf: all at once")
    parser.add_argument("--max-concurrency", type=options.positive, metavar="N")
    parser.add_argument("--input-len", "--random-input-len", type=int, nargs="+", default=[32, 128], metavar="TOKENS")
    parser.add_argument("--output-len", "--random-output-len", type=int, nargs="+", default=[16, 64], metavar="TOKENS")
    parser.add_argument("--trace", metavar="FILE", help="arrivals and lengths of Azure, BurstGPT or Mooncake")
    parser.add_argument("--length-scale", type=float, default=1.0, metavar="X", help="of a trace's prompts and answers")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with prompt, text or turns")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options.add_slo(parser)


def run(args: argparse.Namespace) -> int:
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    server = _http.Server(args.base_url, args.endpoint, fields, args.api_key)
    model = args.model or _first_model(server)
    server = replace(server, fields={"model": model, **fields})
    arrivals = _arrivals(args)
    prompts = _prompts(args, arrivals)
    if err.is_terminal:
        err.print(f"{len(arrivals)} requests to {args.base_url} ...", style="dim")
    begin = time.perf_counter()
    visits = _http.send(server, arrivals, prompts, args.max_concurrency)
    seconds = time.perf_counter() - begin
    result = {
        "backend": "openai",
        "base_url": args.base_url,
        "model_id": model,
        "request_rate": args.request_rate if args.request_rate != float("inf") else "inf",
        "max_concurrency": args.max_concurrency,
        **summary(visits, seconds, options.slo_of(args)),
    }
    errors = Counter(visit.error for visit in visits if visit.error)
    result["errors"] = dict(errors)
    write_json(args.json, result)
    if args.json != "-":
        out.print(table(result))
    for message, count in errors.most_common(3):
        print(f"{count} x {message}", file=sys.stderr)
    return 1 if errors else 0


def _first_model(server: _http.Server) -> str:
    import json

    connection = server.connect()
    try:
        connection.request("GET", "/v1/models", headers=server.headers())
        answer = connection.getresponse()
        body = json.loads(answer.read())
        if answer.status != 200:
            raise InvalidArgument(f"--base-url: {server.url} answered {answer.status}: {body}")
        return str(body["data"][0]["id"])
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--base-url: {server.url}: {error}") from None
    finally:
        connection.close()


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    count, rate = args.num_prompts, args.request_rate
    if args.trace is not None:
        whole = _traces.read(args.trace)
        seconds = count / rate if rate != float("inf") else 1e-3
        return _traces.scaled(whole, count / seconds, seconds, args.length_scale, 1 << 30)[:count]
    source = random.Random(args.seed)
    arrivals, at = [], 0.0
    for _ in range(count):
        lengths = (source.randint(min(bounds), max(bounds)) for bounds in (args.input_len, args.output_len))
        arrivals.append(Arrival(at, *lengths))
        at += source.expovariate(rate) if rate != float("inf") else 0.0
    return arrivals


def _prompts(args: argparse.Namespace, arrivals: list[Arrival]) -> list[str]:
    source = random.Random(args.seed + 1)
    if args.prompts is None:
        return [_http.words(arrival.prompt_tokens, source) for arrival in arrivals]
    texts = _measure.read_prompts(Path(args.prompts))
    return [source.choice(texts) for _ in arrivals]


def table(result: dict[str, Any]) -> Table:
    grid = Table("", "mean", "median", "p99", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in grid.columns[1:]:
        column.justify = "right"
    names = {"ttft": "first token, ms", "tpot": "per token, ms", "itl": "between tokens, ms", "e2el": "whole, ms"}
    for key, name in names.items():
        if f"mean_{key}_ms" in result:
            grid.add_row(name, *(f"{result[f'{kind}_{key}_ms']:,.1f}" for kind in ("mean", "median", "p99")))
    grid.add_section()
    completed = f"{result['completed']:,} of {result['num_prompts']:,}"
    grid.add_row("requests", completed, "", f"{result['request_throughput']:.2f}/s")
    grid.add_row("kept the objective", f"{result['attainment']:.1%}", "", f"{result['request_goodput']:.2f}/s")
    grid.add_row("tokens in", f"{result['total_input_tokens']:,}", "", "")
    grid.add_row("tokens out", f"{result['total_output_tokens']:,}", "", f"{result['output_throughput']:,.1f}/s")
    return grid
