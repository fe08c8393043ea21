"""/v1/completions, /v1/chat/completions, /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flexcore.outputs import CompletionOutput, Logprob
from flexcore.server.errors import ApiError
from flexcore.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    messages_of,
)
from flexcore.server.runner import Delta, Stream
from flexcore.server.state import ServerState, state_of

T = TypeVar("T")
_MOST_PROMPTS = 256
router = APIRouter()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """One or several prompts, as text or token ids."""
    state = state_of(request)
    if body.suffix:
        raise ApiError(400, "suffix: this model does not fill in", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of: got {body.best_of}, wanted n or nothing", "best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: with logprobs it is not here", "echo")
    adapter = state.models.resolve(body.model)
    prompts = await _prompts(state, body.prompt)
    most = body.max_tokens if body.max_tokens is not None else 16
    sampling = body.sampling(min(most, state.max_model_len), body.logprobs)
    streams = await state.runner.submit_batch(prompts, sampling, adapter, body.slo_class)
    writer = _CompletionWriter(state, body, prompts)
    return await _answer(request, body, streams, writer)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The answer to a conversation."""
    state = state_of(request)
    if body.response_format is not None and body.response_format.get("type") != "text":
        kind = body.response_format.get("type")
        raise ApiError(400, f"response_format: got {kind!r}, wanted text", "response_format")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs", "top_logprobs")
    adapter = state.models.resolve(body.model)
    tools = body.tools if body.tool_choice != "none" else None
    ids = await asyncio.to_thread(
        state.encode_chat, messages_of(body.messages), tools, body.add_generation_prompt, body.chat_template_kwargs
    )
    state.check_length(len(ids), "messages")
    most = body.max_completion_tokens or body.max_tokens or state.max_model_len
    sampling = body.sampling(
        min(most, state.max_model_len - len(ids)), (body.top_logprobs or 0) if body.logprobs else None
    )
    stream = await state.runner.submit(ids, sampling, adapter, body.slo_class)
    return await _answer(request, body, [stream], _ChatWriter(state, body))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The ids of a prompt, or of a conversation."""
    state = state_of(request)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: wanted either prompt or messages", "prompt")
    if body.messages is not None:
        messages = messages_of(body.messages)
        ids = await asyncio.to_thread(state.encode_chat, messages, None, body.add_generation_prompt, None)
    else:
        state.check_text(body.prompt or "", "prompt")
        ids = await asyncio.to_thread(state.tokenizer.encode, body.prompt or "", body.add_special_tokens)
    result: dict[str, Any] = {"count": len(ids), "max_model_len": state.max_model_len, "tokens": ids}
    if body.return_token_strs:
        result["token_strs"] = [state.token_text(token) for token in ids]
    return result


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids."""
    state = state_of(request)
    if len(body.tokens) > state.max_model_len:
        raise ApiError(400, f"tokens: got {len(body.tokens)}, wanted at most {state.max_model_len}", "tokens")
    state.check_ids(body.tokens, "tokens")
    return {"prompt": state.tokenizer.decode(body.tokens, skip_special_tokens=False)}


async def _prompts(state: ServerState, prompt: Any) -> list[list[int]]:
    """Text, token ids, or a list of either; the first that is neither is refused."""
    single = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    several = [prompt] if single else prompt
    if not isinstance(several, list) or not several:
        raise ApiError(400, "prompt: wanted text or token ids, or a list of either", "prompt")
    if len(several) > _MOST_PROMPTS:
        raise ApiError(400, f"prompt: got {len(several)} prompts, wanted at most {_MOST_PROMPTS}", "prompt")
    out = []
    for item in several:
        if isinstance(item, str):
            state.check_text(item, "prompt")
            ids = await asyncio.to_thread(state.tokenizer.encode, item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            ids = item
            state.check_length(len(ids), "prompt")
            state.check_ids(ids, "prompt")
        else:
            raise ApiError(400, "prompt: wanted text or token ids, or a list of either", "prompt")
        state.check_length(len(ids), "prompt")
        out.append(ids)
    return out


class _Writer(ABC):
    """The form of one kind of answer. Choices are numbered over all prompts and their n answers."""

    prefix: str

    def __init__(self, state: ServerState, body: Sampling) -> None:
        self.state, self.body = state, body
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    @abstractmethod
    def first(self, choice: int) -> dict[str, Any] | None:
        """A chunk before an answer's first text."""

    @abstractmethod
    def chunk(self, choice: int, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]: ...

    @abstractmethod
    def envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]: ...


class _CompletionWriter(_Writer):
    prefix = "cmpl"

    def __init__(self, state: ServerState, body: CompletionRequest, prompts: list[list[int]]) -> None:
        super().__init__(state, body)
        self._echo = [state.tokenizer.decode(ids) for ids in prompts] if body.echo else None
        self._offsets: dict[int, int] = {}

    def first(self, choice: int) -> dict[str, Any] | None:
        if self._echo is None:
            return None
        return {"index": choice, "text": self._prompt(choice), "logprobs": None, "finish_reason": None}

    def chunk(self, choice: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice,
            "text": delta.text,
            "logprobs": self._logprobs(choice, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._prompt(index) + output.text,
            "logprobs": self._logprobs(index, output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        return {**self.head, "object": "text_completion", "choices": choices}

    def _prompt(self, choice: int) -> str:
        return self._echo[choice // (self.body.n or 1)] if self._echo is not None else ""

    def _logprobs(self, choice: int, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if self.body.logprobs is None:  # type: ignore[attr-defined]
            return None
        tokens = [self.state.token_text(entry.token_id) for entry in logprobs]
        offsets = []
        offset = self._offsets.get(choice, len(self._prompt(choice)))
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [self._by_name(entry.top) for entry in logprobs],
            "text_offset": offsets,
        }

    def _by_name(self, top: list[tuple[int, float]]) -> dict[str, float]:
        """Of tokens that read the same, the more likely has the name, and the other that of its vocabulary."""
        names: dict[str, float] = {}
        for token, logprob in top:
            name = self.state.token_name(token)
            names[self.state.tokenizer.token(token) if name in names else name] = logprob
        return names


class _ChatWriter(_Writer):
    prefix = "chatcmpl"
    body: ChatRequest

    def first(self, choice: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, choice: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if chunk else "chat.completion", "choices": choices}

    def _logprobs(self, logprobs: list[Logprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.state.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(self.state.tokenizer.token_bytes(token))}

        content = [
            {**entry(e.token_id, e.logprob), "top_logprobs": [entry(token, p) for token, p in e.top]} for e in logprobs
        ]
        return {"content": content, "refusal": None}


class _EventStream(StreamingResponse):
    """Frees its requests also when the client is gone before the first event."""

    def __init__(self, events: AsyncIterator[str], streams: list[Stream], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self._streams:
                stream.close()


async def _answer(request: Request, body: Sampling, streams: list[Stream], writer: _Writer) -> Response:
    if body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _EventStream(_events(body, streams, writer), streams, headers)
    try:
        await _while_connected(request, asyncio.gather(*(stream.finished() for stream in streams)))
    finally:
        for stream in streams:
            stream.close()
    outputs = [answer.output for stream in streams for answer in stream.answers]
    for output in outputs:
        if output.finish_reason == "error":
            raise ApiError(500, output.error)
    choices = [writer.choice(index, output) for index, output in enumerate(outputs)]
    return JSONResponse({**writer.envelope(choices, chunk=False), "usage": _usage(streams)})


async def _events(body: Sampling, streams: list[Stream], writer: _Writer) -> AsyncIterator[str]:
    """Server-sent events."""
    options = body.stream_options
    with_usage = options is not None and (options.include_usage or options.continuous_usage_stats)
    continuous = options is not None and options.continuous_usage_stats
    n = len(streams[0].answers)

    def event(choices: list[dict[str, Any]], usage: bool = False) -> str:
        value = writer.envelope(choices, chunk=True)
        if with_usage:
            value["usage"] = _usage(streams) if usage else None
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    try:
        for choice in range(n * len(streams)):
            if (first := writer.first(choice)) is not None:
                yield event([first], continuous)
        async for number, delta in _merged(streams):
            if delta.finish_reason == "error":
                raise ApiError(500, streams[number].answers[delta.index].output.error)
            if delta.text or delta.logprobs or delta.finish_reason is not None:
                yield event([writer.chunk(number * n + delta.index, delta)], continuous)
        if with_usage:
            yield event([], True)
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is out already
        yield f"data: {json.dumps(error.body())}\n\n"


async def _merged(streams: list[Stream]) -> AsyncIterator[tuple[int, Delta]]:
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    ready: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def read(number: int, stream: Stream) -> None:
        try:
            async for delta in stream:
                ready.put_nowait((number, delta))
            ready.put_nowait((number, None))
        except ApiError as error:
            ready.put_nowait((number, error))

    readers = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            number, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield number, item
    finally:
        for reader in readers:
            reader.cancel()


async def _while_connected(request: Request, work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """The result of `work`; CancelledError when the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


def _usage(streams: list[Stream]) -> dict[str, Any]:
    prompt = sum(stream.prompt_tokens for stream in streams)
    completion = sum(stream.completion_tokens for stream in streams)
    cached = sum(stream.num_cached_tokens for stream in streams)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
