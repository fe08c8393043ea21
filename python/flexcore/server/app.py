"""The FastAPI application: routes, errors, keys, limits, start and end."""

from __future__ import annotations

import asyncio
import hmac
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import flexcore
from flexcore._core import SLO
from flexcore.llm import LLM
from flexcore.server import generation
from flexcore.server import resources as resource_routes
from flexcore.server.errors import ApiError, of_engine
from flexcore.server.evaluations import BACKGROUND
from flexcore.server.finetuning import JobManager
from flexcore.server.metrics import Engine as EngineState
from flexcore.server.metrics import Metrics
from flexcore.server.models import Models
from flexcore.server.runner import EngineRunner
from flexcore.server.state import ServerConfig, ServerState
from flexcore.server.store import Store, identity

log = logging.getLogger("flexcore.server")
_LAG_INTERVAL = 0.05  # seconds


def create_app(llm: LLM, config: ServerConfig) -> FastAPI:
    """Serves `llm`. Raises what a broken data directory or adapter raises."""
    runner = EngineRunner(llm, config.max_waiting)
    store = Store(config.data_dir)
    model = llm.engine.model()
    state = ServerState(config, llm.tokenizer, model.vocab_size, model.max_model_len)
    state.runner, state.store = runner, store
    base = identity(llm.engine.model_directory)
    state.models = Models(runner, store, base, list(config.served_names), config.max_loras)
    state.jobs = JobManager(runner, store, base, config)
    state.metrics = Metrics(config.served_names[0], state.jobs.trains)
    runner.observers.append(state.metrics.step)
    runner.finished = state.metrics.answered
    llm.engine.set_slo(SLO(tpot_ms=1e6, ttft_ms=1e7, attainment=llm.slo.attainment), BACKGROUND)
    for name, directory in config.lora_modules:
        llm.engine.load_adapter(name, directory)
        state.models.given(name, directory)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner.start()
        state.jobs.restart()
        watch = asyncio.create_task(_watch_lag(state.metrics))
        yield
        watch.cancel()
        try:
            await state.jobs.stop()
        finally:
            await runner.stop()
            store.close()

    app = FastAPI(
        title="flexcore",
        version=flexcore.__version__,
        description="An OpenAI-compatible server that serves and finetunes at once.",
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
    )
    app.state.server = state
    app.include_router(generation.router)
    app.include_router(resource_routes.router)
    _add_operations(app, state)
    _add_errors(app, state)
    app.add_middleware(_Guard, state=state)
    if config.allowed_origins:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def _watch_lag(metrics: Metrics) -> None:
    while True:
        due = time.perf_counter() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.lag.observe(max(0.0, time.perf_counter() - due))


def _add_operations(app: FastAPI, state: ServerState) -> None:
    runner, store = state.runner, state.store

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 while the engine runs."""
        return Response(status_code=200 if runner.error is None else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": flexcore.__version__}

    def look() -> tuple[dict[str, float], dict[str, int], list[tuple[str, bool]]]:
        adapters = [(adapter.name, adapter.training) for adapter in runner.engine.adapters()]
        return runner.engine.stats(), runner.engine.memory(), adapters

    async def engine_state() -> EngineState:
        stats, memory, adapters = await runner.call(look)
        counts = store.select("SELECT status, COUNT(*) AS n FROM jobs GROUP BY status")
        rows = store.select("SELECT id, step, trained_tokens FROM jobs")
        return EngineState(
            stats=stats,
            memory=memory,
            adapters=adapters,
            jobs={row["status"]: row["n"] for row in counts},
            losses=state.jobs.losses(),
            job_tokens={row["id"]: row["trained_tokens"] for row in rows},
            job_steps={row["id"]: row["step"] for row in rows},
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        text = state.metrics.text(await engine_state())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/flexcore/status")
    async def status() -> dict[str, Any]:
        """What the page at / shows."""
        engine = await engine_state()
        state.metrics.engine = engine
        slo = state.runner.llm.slo
        return {
            **state.metrics.snapshot(),
            "slo": {"tpot_ms": slo.tpot_ms, "ttft_ms": slo.ttft_ms, "attainment": slo.attainment},
            "running": engine.stats.get("requests_running", 0),
            "waiting": engine.stats.get("requests_waiting", 0),
            "requests": engine.stats.get("slo.default.requests", 0),
            "kept": engine.stats.get("slo.default.kept", 0),
            "pages": engine.stats.get("kv_blocks", 0),
            "pages_free": engine.stats.get("kv_blocks_free", 0),
            "memory": engine.memory,
            "model": state.models.names[0],
            "device": runner.engine.model().device,
            "version": flexcore.__version__,
        }

    if state.config.dashboard:
        page = resources.files("flexcore.server").joinpath("page.html").read_text(encoding="utf-8")

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> HTMLResponse:
            return HTMLResponse(page, headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI, state: ServerState) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        if error.status == 429:
            state.metrics.rejected(error.code or "limit")
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(flexcore.Error)
    async def engine_error(request: Request, error: flexcore.Error) -> Response:
        return await api_error(request, of_engine(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # The union's branches are no part of the name: body, field, index, ...
        where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
        param = ".".join(where) or None
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument supplied: {param}"
        elif first["type"] == "json_invalid":
            message, param = (
                "We could not parse the JSON body of your request: " + str(first.get("ctx", {}).get("error", "")),
                None,
            )
        else:
            message = f"{param}: {first['msg']}" if param else first["msg"]
        return await api_error(request, ApiError(400, message, param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"Unknown request URL: {request.method} {request.url.path}"
        headers = dict(error.headers) if error.headers else None
        return await api_error(request, ApiError(error.status_code, message, headers=headers))

    @app.exception_handler(OSError)
    async def os_error(request: Request, error: OSError) -> Response:
        log.exception("%s %s", request.method, request.url.path)
        return JSONResponse(ApiError(507, f"the server's storage: {error}", code="storage").body(), 507)

    @app.exception_handler(sqlite3.OperationalError)
    async def database_error(request: Request, error: sqlite3.OperationalError) -> Response:
        return await os_error(request, OSError(str(error)))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.exception("%s %s", request.method, request.url.path)
        return JSONResponse(ApiError(500, f"{type(error).__name__}: {error}").body(), 500)


class _Guard:
    """Keys and the sizes of bodies, before anything is read."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._config = app, state.config
        self._keys = [key.encode() for key in state.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and _needs_key(scope) and not self._knows(headers.get(b"authorization", b"")):
            error = ApiError(401, "Incorrect API key provided", code="invalid_api_key")
            answer = JSONResponse(error.body(), 401, headers={"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, send)
            return
        most = self._config.max_file_bytes if scope["path"] == "/v1/files" else self._config.max_body_bytes
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            await JSONResponse(_too_large(most).body(), 413, headers={"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _limited(receive, most), send)

    def _knows(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        # Every key is compared, each in constant time.
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)


def _needs_key(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] != "OPTIONS" and path.startswith(("/v1", "/tokenize", "/detokenize"))


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


def _limited(receive: Receive, most: int) -> Callable[[], Awaitable[Message]]:
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(413, _too_large(most).message)
        return message

    return limited
