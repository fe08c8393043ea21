"""Arrival traces: published ones from their files, and made ones; scaled to a rate and to a model's context."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from flexcore import InvalidArgument


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int


def read(path: str | Path) -> list[Arrival]:
    """Azure LLM inference 2023 (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT (CSV: Timestamp, Request
    tokens, Response tokens; failed requests, without a response, are left out) or Mooncake (JSON lines: timestamp in
    ms, input_length, output_length); gzip too. In order of arrival, the first one at 0."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"trace: {path} cannot be read: {error}") from None
    rows = list(_json_lines(path, text) if text.lstrip().startswith("{") else _csv(path, text))
    arrivals = sorted((row for row in rows if row.output_tokens > 0), key=lambda row: row.at)
    if not arrivals:
        raise InvalidArgument(f"trace: {path} has no requests")
    return [replace(row, at=row.at - arrivals[0].at) for row in arrivals]


def _json_lines(path: Path, text: str) -> Iterator[Arrival]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Arrival(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"trace: {path}, line {number}: {error!r}, wanted a Mooncake request") from None


def _csv(path: Path, text: str) -> Iterator[Arrival]:
    reader = csv.DictReader(io.StringIO(text))
    names = reader.fieldnames or []
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(names):
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        time: Callable[[str], float] = _azure_time
    elif {"Timestamp", "Request tokens", "Response tokens"} <= set(names):
        columns, time = ("Timestamp", "Request tokens", "Response tokens"), float
    else:
        raise InvalidArgument(f"trace: {path} has the columns {names}, wanted those of Azure's or BurstGPT's trace")
    try:
        for row in reader:
            at, prompt, output = (row[name] for name in columns)
            yield Arrival(time(at), int(float(prompt)), int(float(output)))
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"trace: {path}, line {reader.line_num}: {error}") from None


def _azure_time(text: str) -> float:
    whole, _, fraction = text.partition(".")  # seven digits, one more than datetime reads
    return datetime.fromisoformat(whole).timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


def poisson(rate: float, seconds: float, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> list[Arrival]:
    """`rate` requests a second; lengths uniform between the bounds."""
    source = random.Random(seed)
    arrivals, at = [], source.expovariate(rate)
    while at < seconds:
        arrivals.append(Arrival(at, source.randint(*prompt), source.randint(*output)))
        at += source.expovariate(rate)
    return arrivals


def burst(arrivals: Iterable[Arrival], begin: float, end: float, factor: float, seed: int) -> list[Arrival]:
    """The arrivals in [begin, end) `factor` times, the copies spread over the same time."""
    source = random.Random(seed)
    out: list[Arrival] = []
    for arrival in arrivals:
        out.append(arrival)
        if not begin <= arrival.at < end:
            continue
        copies = int(factor - 1) + (source.random() < (factor - 1) % 1)
        out += [replace(arrival, at=source.uniform(begin, end)) for _ in range(copies)]
    return sorted(out, key=lambda arrival: arrival.at)


def scaled(trace: list[Arrival], rate: float, seconds: float, lengths: float, most_tokens: int) -> list[Arrival]:
    """The first requests of a trace, its clock changed so that `rate` come a second and as many as fill `seconds`;
    prompts and answers `lengths` times as long, the prompt cut to what a sequence of `most_tokens` holds. A trace that
    is too short begins again."""
    wanted = max(1, round(rate * seconds))
    span = trace[-1].at * len(trace) / max(1, len(trace) - 1) or 1.0
    rows = [replace(row, at=row.at + lap * span) for lap in range(-(-wanted // len(trace))) for row in trace][:wanted]
    stretch = seconds / (rows[-1].at * len(rows) / max(1, len(rows) - 1) or 1.0)
    out = []
    for row in rows:
        output = min(max(1, round(row.output_tokens * lengths)), most_tokens - 1)
        prompt = min(max(1, round(row.prompt_tokens * lengths)), most_tokens - output)
        out.append(Arrival(row.at * stretch, prompt, output))
    return out
