"""A client of an OpenAI-compatible server: a thread a request, tokens timed as they arrive."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from flexcore import InvalidArgument
from flexcore.bench._client import Visit
from flexcore.bench._traces import Arrival

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "group")


@dataclass(frozen=True)
class Server:
    """Where requests go; `fields` are those of every body."""

    url: str  # http://host:port
    endpoint: str = "/v1/completions"
    fields: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout: float = 600.0

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgument(f"--base-url: got {self.url!r}, wanted http://host:port")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, timeout=self.timeout)

    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}


def words(count: int, source: random.Random) -> str:
    """About so many tokens."""
    return " ".join(source.choices(_WORDS, k=count))


def send(
    server: Server, arrivals: Sequence[Arrival], prompts: Sequence[str], max_concurrency: int | None = None
) -> list[Visit]:
    """Every request at its time, or as soon as fewer than `max_concurrency` are on their way."""
    visits = [Visit(arrival.at, arrival.prompt_tokens) for arrival in arrivals]
    room = threading.Semaphore(max_concurrency or len(arrivals) or 1)
    threads = []
    start = time.perf_counter()

    def one(arrival: Arrival, prompt: str, visit: Visit) -> None:
        with room:
            if max_concurrency is not None:  # it waited for the client's sake
                visit.arrival = time.perf_counter() - start
            ask(server, prompt, arrival.output_tokens, visit, start)

    for arrival, prompt, visit in zip(arrivals, prompts, visits, strict=True):
        time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        threads.append(threading.Thread(target=one, args=(arrival, prompt, visit), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return visits


def ask(server: Server, prompt: str, max_tokens: int, visit: Visit, start: float) -> None:
    """Fills the visit; an error is its `error`."""
    chat = server.endpoint.endswith("chat/completions")
    question = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    body = {**question, "max_tokens": max_tokens, "temperature": 0.0, "stream": True, **server.fields}
    connection = server.connect()
    try:
        connection.request("POST", server.endpoint, json.dumps(body), server.headers())
        answer = connection.getresponse()
        if answer.status != 200:
            visit.error = f"{answer.status}: {answer.read(2000).decode(errors='replace')}"
            return
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                visit.error = str(event["error"])
                return
            if usage := event.get("usage"):
                visit.prompt_tokens = usage["prompt_tokens"]
                visit.output_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                text = choice["delta"].get("content") if chat else choice["text"]
                if text:
                    visit.times.append(time.perf_counter() - start)
                    visit.text += text
        if not visit.times and visit.output_tokens:  # tokens that are no text
            visit.times.append(time.perf_counter() - start)
        visit.done = bool(visit.times)
        if not visit.done:
            visit.error = "an answer without tokens"
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        visit.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
