"""The engine on a thread of its own, and what a coroutine asks of it."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flexcore._core import DeviceError, Error, SamplingParams, StepReport
from flexcore.llm import LLM
from flexcore.outputs import Answer, Logprob
from flexcore.server.errors import ApiError

T = TypeVar("T")
log = logging.getLogger("flexcore.server")
_MOST_FAILURES = 3  # of steps, one after the other


@dataclass
class Delta:
    """What a step added to one answer of a request."""

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Adapter:
    """Whom a request asks; None is the base model. `load`, on the engine's thread, sees to it that it is there."""

    name: str | None = None
    load: Callable[[], None] | None = None


class Stream:
    """A request on its way: deltas of its answers, until all have ended. Iterate once."""

    def __init__(
        self, runner: EngineRunner, answers: list[Answer], prompt_tokens: int, sampling: SamplingParams
    ) -> None:
        self.answers, self.prompt_tokens, self.sampling = answers, prompt_tokens, sampling
        self.request_ids: list[int] = []
        self.arrival = time.perf_counter()
        self.token_times: list[list[float]] = [[] for _ in answers]
        self._runner = runner
        self._deltas: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._left = len(answers)

    def put(self, delta: Delta | ApiError) -> None:
        self._deltas.put_nowait(delta)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._left:
            delta = await self._deltas.get()
            if isinstance(delta, ApiError):
                raise delta
            if delta.finish_reason is not None:
                self._left -= 1
            yield delta

    async def finished(self) -> Stream:
        """All of its answers, whole."""
        async for _ in self:
            pass
        return self

    def close(self) -> None:
        """Frees what is unfinished: the client has gone."""
        if self._left:
            self._runner.cancel(self)

    @property
    def num_cached_tokens(self) -> int:
        return max((answer.output.num_cached_tokens for answer in self.answers), default=0)

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.output.token_ids) for answer in self.answers)


class EngineRunner:
    """Steps the engine while it has work; everything else that touches it comes through the inbox, between two steps.
    Coroutines wait for futures, so that the event loop never does."""

    def __init__(self, llm: LLM, max_waiting: int) -> None:
        self.llm, self.engine = llm, llm.engine
        self.max_waiting = max_waiting  # requests that may be unfinished at once
        self.after_step: list[Callable[[StepReport], None]] = []  # on the engine's thread
        self.when_idle: list[Callable[[], None]] = []  # on the engine's thread, when it has nothing to do
        self.observers: list[Callable[[StepReport, float], None]] = []  # on the event loop, with the step's end
        self.finished: Callable[[Stream, Answer], None] = lambda stream, answer: None
        self.error: ApiError | None = None  # why it no longer runs
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Stream, Answer]] = {}  # by request; the event loop's
        self._calls: set[asyncio.Future[Any]] = set()  # that are waited for
        self._pending = 0  # answers that were asked for and have not ended
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="flexcore-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    # From the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """After the step that runs. What is unfinished ends with an error."""
        self._stopping = True
        self._inbox.put(lambda: None)
        await asyncio.to_thread(self._thread.join)
        self._fail(ApiError(503, "the server is shutting down", code="shutting_down"))

    @property
    def num_pending(self) -> int:
        return self._pending

    async def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """The result of a function that runs on the engine's thread, between two steps."""
        if self.error is not None:
            raise self.error
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def work() -> None:
            try:
                result = function(*args, **options)
            except BaseException as error:
                self.to_loop(_set_exception, future, error)
            else:
                self.to_loop(_set_result, future, result)

        self._inbox.put(work)
        return await future

    def post(self, work: Callable[[], object]) -> None:
        """Runs it on the engine's thread, between two steps. Any thread may call it."""
        self._inbox.put(work)

    async def submit(
        self, ids: Sequence[int], sampling: SamplingParams, adapter: Adapter, slo_class: str | None = None
    ) -> Stream:
        return (await self.submit_batch([ids], sampling, adapter, slo_class))[0]

    async def submit_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        adapter: Adapter,
        slo_class: str | None = None,
    ) -> list[Stream]:
        """All or none. Raises ApiError 429 when there is no room, and what the engine refuses."""
        count = len(prompts) * max(1, sampling.n)
        if count > self.max_waiting:
            raise ApiError(400, f"n: {count} answers at once, wanted at most {self.max_waiting}", "n")
        if self._pending + count > self.max_waiting:
            message = f"{self._pending} requests are waiting or running, and no more than {self.max_waiting} may be"
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        tokenizer = self.llm.tokenizer
        streams = [
            Stream(self, [Answer(k, tokenizer, sampling) for k in range(max(1, sampling.n))], len(ids), sampling)
            for ids in prompts
        ]
        inner = self.llm.engine_sampling(sampling)
        arrival = time.perf_counter()

        def work() -> None:
            requests: list[int] = []
            try:
                if adapter.load is not None:
                    adapter.load()
                waited = 1000 * (time.perf_counter() - arrival)
                for ids in prompts:
                    first = self.engine.submit(list(ids), inner, adapter.name, slo_class, waited)
                    requests += range(first, first + sampling.n)
            except BaseException:
                for request in requests:
                    self.engine.cancel(request)
                self.to_loop(self._unpend, count)
                raise
            self.to_loop(self._register, streams, requests)

        if self.error is not None:
            raise self.error
        self._pending += count
        try:
            await self.call(work)
        except asyncio.CancelledError:  # the client left while its requests were on their way in
            self._inbox.put(lambda: self.to_loop(self._cancel_all, streams))
            raise
        return streams

    def cancel(self, stream: Stream) -> None:
        for request in stream.request_ids:
            if self._streams.pop(request, None) is not None:
                self._pending -= 1
                self._cancel(request)

    def _cancel(self, request: int) -> None:
        self._inbox.put(functools.partial(self.engine.cancel, request))

    def _register(self, streams: list[Stream], requests: list[int]) -> None:
        """Before the first token is delivered: the loop takes calls in their order."""
        position = 0
        for stream in streams:
            for answer in stream.answers:
                stream.request_ids.append(requests[position])
                self._streams[requests[position]] = (stream, answer)
                position += 1

    def _cancel_all(self, streams: list[Stream]) -> None:
        for stream in streams:
            self.cancel(stream)

    def _unpend(self, count: int) -> None:
        self._pending -= count

    def _deliver(self, report: StepReport, end: float) -> None:
        for event in report.outputs:
            found = self._streams.get(event.request_id)
            if found is None:
                continue
            stream, answer = found
            tokens = len(answer.output.token_ids)
            logprobs = len(answer.output.logprobs)
            text = answer.push(event)
            output = answer.output
            if len(output.token_ids) > tokens:
                stream.token_times[output.index].append(end)
            stream.put(
                Delta(output.index, text, output.token_ids[tokens:], output.logprobs[logprobs:], output.finish_reason)
            )
            if answer.finished:
                del self._streams[event.request_id]
                self._pending -= 1
                self.finished(stream, answer)
                if event.finish_reason is None:  # a stop string, of which the engine knows nothing
                    self._cancel(event.request_id)
        for observer in self.observers:
            observer(report, end)

    def _fail(self, error: ApiError) -> None:
        self.error = self.error or error
        streams = {id(stream): stream for stream, _ in self._streams.values()}
        self._streams.clear()
        self._pending = 0
        for future in list(self._calls):
            _set_exception(future, self.error)
        for stream in streams.values():
            stream.put(error)

    # On the engine's thread

    def _run(self) -> None:
        failures = 0  # in a row
        try:
            while not self._stopping:
                if not self.engine.has_work():
                    for look in self.when_idle:
                        look()
                if not self.engine.has_work():
                    self._inbox.get()()
                while not self._inbox.empty():
                    self._inbox.get()()
                if self._stopping or not self.engine.has_work():
                    continue
                try:
                    report = self.engine.step()
                except Error as error:  # requests are as they were before the step
                    failures += 1
                    if failures == _MOST_FAILURES or isinstance(error, DeviceError):
                        raise
                    log.exception("a step failed")
                    continue
                failures = 0
                end = time.perf_counter()
                self.to_loop(self._deliver, report, end)
                for function in self.after_step:
                    function(report)
        except BaseException as error:
            log.exception("the engine has stopped")
            self.to_loop(self._fail, ApiError(503, f"the engine has stopped: {error}", code="engine_stopped"))

    def to_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed
            self._stopping = True


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
