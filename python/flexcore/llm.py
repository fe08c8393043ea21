"""fc.LLM: an engine with a tokenizer; text in, text out."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexcore import datasets
from flexcore._core import (
    EngineConfig,
    Error,
    FinetuneConfig,
    FinetuneEvent,
    InvalidArgument,
    SamplingParams,
    StepReport,
)
from flexcore.adapters import AdapterConfig
from flexcore.chat_template import Message
from flexcore.engine import Engine
from flexcore.models import ModelPath
from flexcore.outputs import Answer, CompletionOutput, FinetuneResult, RequestOutput
from flexcore.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "FinetuneResult", "RequestOutput"]

Rows = str | Path | Iterable[Mapping[str, Any]]
Prompt = str | Sequence[int]
_ACTIVE = ("queued", "running")  # states of a job that stepping moves on


class LLM:
    """Serves and finetunes one model with text.

    `model` as in Engine; further keywords are EngineConfig fields: LLM("path", dtype="float32"). Several threads may
    call it; every call that steps the engine moves all requests and finetuning jobs on.
    """

    def __init__(
        self,
        model: ModelPath,
        config: EngineConfig | None = None,
        *,
        chat_template: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise InvalidArgument(f"LLM: got a config and {', '.join(options)}, wanted one of the two ways")
        chosen = config if config is not None else EngineConfig(**options)
        self.slo = chosen.slo
        self.engine = Engine(model, chosen, progress)
        self.tokenizer = Tokenizer(self.engine.model_directory, chat_template)
        # Many chat models name their end of turn in the tokenizer's files only, and the engine does not read those.
        vocab_size = self.engine.model().vocab_size
        self._end_tokens = [token for token in self.tokenizer.eos_token_ids() if token < vocab_size]
        self._answers: dict[int, Answer] = {}  # by request
        self._events: dict[int, list[FinetuneEvent]] = {}  # by job
        self._lock = threading.RLock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Completes all prompts (text or token ids) at once; `sampling` and `adapter` are for all, or one for each."""
        batch = _as_batch(prompts)
        ids = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in batch]
        params = _for_each(sampling if sampling is not None else SamplingParams(), len(ids), "sampling")
        return self._run(batch, ids, params, _for_each(adapter, len(ids), "adapter"))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
        adapter: str | None = None,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several at once. `variables` go to the chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        texts = [self.tokenizer.apply_chat_template(each, tools, **variables) for each in conversations]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        params = sampling if sampling is not None else SamplingParams()
        return self._run(texts, ids, [params] * len(ids), [adapter] * len(ids))

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling: SamplingParams | None = None,
        adapter: str | None = None,
    ) -> Iterator[str]:
        """The answer to a prompt (text or token ids) or a conversation, piece by piece."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        params = sampling if sampling is not None else SamplingParams()
        if params.n != 1:
            raise InvalidArgument(f"stream: sampling.n: got {params.n}, wanted 1")
        (request, answer), *_ = self.submit(ids, params, adapter)
        sent = 0
        try:
            while not answer.finished or sent < len(answer.output.text):
                if sent == len(answer.output.text):
                    self.step()
                text = answer.output.text[sent:]
                sent += len(text)
                if text:
                    yield text
        finally:
            self._abandon([request])

    def submit(
        self, ids: Sequence[int], sampling: SamplingParams, adapter: str | None = None
    ) -> list[tuple[int, Answer]]:
        """Queues a request; step() fills its answers. For callers that drive the loop themselves."""
        with self._lock:
            first = self.engine.submit(ids, self.engine_sampling(sampling), adapter)
            pairs = [(first + k, Answer(k, self.tokenizer, sampling)) for k in range(sampling.n)]
            self._answers.update(pairs)
        return pairs

    def step(self) -> StepReport:
        """One iteration; hands tokens to their answers and keeps the steps of finetuning jobs."""
        with self._lock:
            report = self.engine.step()
            for event in report.outputs:
                answer = self._answers.get(event.request_id)
                if answer is None:
                    continue
                answer.push(event)
                if answer.finished:
                    del self._answers[event.request_id]
                    if event.finish_reason is None:  # a stop string, of which the engine knows nothing
                        self.engine.cancel(event.request_id)
            for step in report.finetune:
                if step.job_id in self._events:
                    self._events[step.job_id].append(step)
        return report

    def finetune(
        self,
        name: str,
        data: Rows,
        config: FinetuneConfig | None = None,
        lora: AdapterConfig | None = None,
        *,
        max_length: int | None = None,
        progress: Callable[[FinetuneEvent], None] | None = None,
    ) -> FinetuneResult:
        """Trains the adapter `name` (made if there is none, of any method) on a file or rows, and serves it when done.

        Chat, prompt/completion, Alpaca, ShareGPT, text or token rows (see flexcore.datasets). Rows longer than
        `max_length` (default: the engine's max_model_len) are cut, with a warning. Raises what wait() raises.
        Any other exception on the way, Ctrl-C included, cancels the job; the adapter keeps the steps made.
        """
        dataset = self.load_dataset(data, max_length)
        if dataset.truncated or dataset.dropped:
            warnings.warn(f"finetune: {dataset.summary()}", stacklevel=2)
        is_new = name not in {adapter.name for adapter in self.engine.adapters()}
        if is_new:
            self.engine.create_adapter(name, lora, seed=config.seed if config is not None else 0)
        elif lora is not None:
            raise InvalidArgument(f"finetune: lora: the adapter {name!r} exists; unload it, or leave lora out")
        try:
            with self._lock:
                job = self.engine.finetune(name, dataset.examples, config)
                self._events[job] = []
        except BaseException:
            if is_new:  # so that the corrected call finds what this one found
                self.engine.unload_adapter(name)
            raise
        try:
            return self.wait(job, progress)
        except BaseException:
            if self.engine.job(job).status in _ACTIVE:
                self.engine.cancel_job(job)
            raise

    def load_dataset(self, data: Rows, max_length: int | None = None) -> datasets.Dataset:
        """Rows as examples for engine.finetune."""
        longest = self.engine.model().max_model_len if max_length is None else max_length
        return datasets.load(data, self.tokenizer, longest)

    def wait(self, job: int, progress: Callable[[FinetuneEvent], None] | None = None) -> FinetuneResult:
        """Steps until a finetuning job has ended.

        Raises Error if it failed, and InvalidArgument if it is paused, which nobody but the caller of
        engine.resume_job() can end.
        """
        events = self._events.setdefault(job, [])
        seen = 0
        try:
            while (info := self.engine.job(job)).status in _ACTIVE:
                self.step()
                for event in events[seen:]:
                    if progress:
                        progress(event)
                seen = len(events)
        finally:
            self._events.pop(job, None)
        if info.status == "paused":
            raise InvalidArgument(
                f"wait: job: got {job} on {info.adapter!r}, which is paused; engine.resume_job({job}) lets it go on"
            )
        if info.status == "failed":
            raise Error(f"finetune: job {job} on {info.adapter!r} failed: {info.error}")
        return FinetuneResult(info, events)

    def _run(
        self,
        prompts: Sequence[Prompt],
        ids: list[list[int]],
        sampling: Sequence[SamplingParams],
        adapters: Sequence[str | None],
    ) -> list[RequestOutput]:
        submitted: list[list[tuple[int, Answer]]] = []
        try:
            for index, params in enumerate(sampling):
                submitted.append(self.submit(ids[index], params, adapters[index]))
            while any(not answer.finished for group in submitted for _, answer in group):
                self.step()
        finally:
            self._abandon([request for group in submitted for request, _ in group])
        return [
            RequestOutput(prompt if isinstance(prompt, str) else "", tokens, [answer.output for _, answer in group])
            for prompt, tokens, group in zip(prompts, ids, submitted, strict=True)
        ]

    def engine_sampling(self, sampling: SamplingParams) -> SamplingParams:
        """`sampling` in tokens alone: stop strings are found here, the tokenizer's end of turn goes in."""
        if not isinstance(sampling, SamplingParams):
            raise InvalidArgument(
                f"sampling: got {sampling!r} ({type(sampling).__name__}), wanted a flexcore.SamplingParams"
            )
        inner = copy.copy(sampling)
        inner.stop = []
        if not sampling.ignore_eos:
            inner.stop_token_ids = [*sampling.stop_token_ids, *self._end_tokens]
        return inner

    def _abandon(self, requests: Sequence[int]) -> None:
        """Cancels what is unfinished, so that an interrupted call leaves nothing running."""
        for request in requests:
            with self._lock:
                if self._answers.pop(request, None) is not None:
                    with contextlib.suppress(Exception):
                        self.engine.cancel(request)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    batch: list[Any] = list(prompts)
    if batch and all(hasattr(item, "__index__") for item in batch):  # one prompt as ids
        return [batch]
    for index, item in enumerate(batch):
        if isinstance(item, Mapping):
            raise InvalidArgument(
                f"generate: prompts[{index}]: got a message, wanted text or token ids; chat() takes messages"
            )
    return batch


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise InvalidArgument(
                f"generate: {name}: got {len(value)} for {count} prompts, wanted one for all or one for each"
            )
        return list(value)
    return [value] * count
