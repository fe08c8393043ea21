"""A server for tests: the application under uvicorn in a thread, or the command in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore.server.app import create_app
from flexcore.server.state import ServerConfig, ServerState
from flexcore.tiny import write_tiny_model

ENGINE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, "num_threads": 2}
CHAT_ROWS = [
    {"messages": [{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": f"hello {k}"}]}
    for k in range(12)
]


def write_model(directory: Path) -> Path:
    return write_byte_tokenizer(write_tiny_model(directory, vocab_size=272))


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return body


class Served:
    """A running server: where it is, and what is inside when it runs in a thread."""

    def __init__(self, url: str, state: ServerState | None = None) -> None:
        self.url, self._state = url, state

    @property
    def state(self) -> ServerState:
        assert self._state is not None
        return self._state

    def openai(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**({"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0} | options))

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@contextmanager
def serving(llm: fc.LLM, data_dir: Path, **fields: Any) -> Iterator[Served]:
    app = create_app(llm, ServerConfig(**({"served_names": ("tiny",), "data_dir": data_dir} | fields)))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    assert thread.is_alive()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


class Process:
    """`flexcore serve` on a port of its own; kill() is kill -9."""

    def __init__(self, model: Path, data_dir: Path, *words: str, log: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--port", str(port), "--data-dir", str(data_dir), "--served-model-name", "tiny", *words]
        options += [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
        with (log or Path(os.devnull)).open("ab") as out:
            command = [sys.executable, "-m", "flexcore", "serve", str(model), *options]
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        self.served = Served(f"http://127.0.0.1:{port}")
        wait_for(self._answers, seconds=120)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
        try:
            return httpx.get(self.served.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def wait_for(condition: Any, seconds: float = 60.0, every: float = 0.02) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return value
