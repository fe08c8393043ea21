"""What fc.LLM returns, and the text state of a request while its tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexcore._core import FinetuneEvent, JobInfo, SamplingParams, TokenEvent
from flexcore.detokenizer import StopStrings
from flexcore.tokenizer import Tokenizer


@dataclass
class Logprob:
    """A token's log-probability, with the most likely tokens beside it (SamplingParams.logprobs)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class CompletionOutput:
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"; None while it runs
    stop_reason: str | None = None  # the stop string, if one ended it
    cumulative_logprob: float = 0.0
    logprobs: list[Logprob] = field(default_factory=list)  # filled if SamplingParams.logprobs is set
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens after the first, when asked for
    error: str = ""  # why, with the finish_reason "error"
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    queue_ms: float = 0.0  # from arrival to the first step that worked on it
    ttft_ms: float = 0.0  # from arrival to the first token


@dataclass
class RequestOutput:
    """A prompt and its answers; text, token_ids, finish_reason and logprobs are those of the first."""

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[Logprob]:
        return self.outputs[0].logprobs


@dataclass
class FinetuneResult:
    """An ended job: its state, and its optimizer steps while it was waited for."""

    job: JobInfo
    events: Sequence[FinetuneEvent]

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.events]


class Answer:
    """Collects one answer: tokens in, text out, stop strings applied."""

    def __init__(self, index: int, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.output = CompletionOutput(index)
        self._detokenizer = tokenizer.detokenizer()
        self._stop = StopStrings(sampling.stop)
        self._min_tokens = sampling.min_tokens
        self._wants_logprobs = sampling.logprobs is not None

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def push(self, event: TokenEvent) -> str:
        """Takes a token; returns the text that is now certain. Sets finish_reason when it was the last one."""
        if self.finished:
            return ""
        piece = ""
        self.output.error = event.error
        if event.prompt_logprobs:
            self.output.prompt_logprobs = event.prompt_logprobs
        self.output.num_cached_tokens = event.num_cached_tokens
        self.output.queue_ms, self.output.ttft_ms = event.queue_ms, event.ttft_ms
        if event.token_id >= 0:
            self.output.token_ids.append(event.token_id)
            self.output.cumulative_logprob += event.logprob
            if self._wants_logprobs:
                self.output.logprobs.append(Logprob(event.token_id, event.logprob, event.top_logprobs))
            piece = self._detokenizer.push(event.token_id)
            if len(self.output.token_ids) > self._min_tokens:  # as in vLLM, a stop string begins after min_tokens
                piece = self._stop.push(piece)
        reason = event.finish_reason
        if reason is not None:
            piece += self._stop.push(self._detokenizer.finish()) + self._stop.finish()
        if self._stop.found is not None:
            reason, self.output.stop_reason = "stop", self._stop.found
        self.output.finish_reason = reason
        self.output.text += piece
        return piece
