"""The validation losses of a job's checkpoints. On the engine's thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flexcore._core import Error, Example, SamplingParams, TokenEvent
from flexcore.engine import Engine
from flexcore.server.store import Store

BACKGROUND = "flexcore-background"  # the class of requests that nobody waits for
PATIENCE = 5.0  # seconds that an evaluation waits for a step in which nobody is served


@dataclass
class _Evaluation:
    """Of one checkpoint."""

    model: str  # the adapter's name
    directory: str
    checkpoint: str
    step: int
    next: int = 0
    request: int = -1  # that runs
    waits_since: float = field(default_factory=time.monotonic)
    log_likelihood: float = 0.0
    targets: int = 0


class Evaluations:
    """The validation file under one checkpoint after the other, one example after the other in the serving path, when
    nobody else is served. True as long as one is left."""

    def __init__(self, engine: Engine, store: Store, job: str, examples: list[Example], max_length: int) -> None:
        self._engine, self._store, self._job = engine, store, job
        self._examples, self._max_length = examples, max_length
        self._queue: list[_Evaluation] = []

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, name: str, checkpoint: str, step: int) -> None:
        if not self._examples:
            return
        directory = str(self._store.adapter_directory(self._job, step))
        self._queue.append(_Evaluation(f"{name} (evaluation)", directory, checkpoint, step))

    def asked(self, request: int) -> bool:
        return bool(self._queue) and self._queue[0].request == request

    def go_on(self, nobody: bool) -> None:
        """With the next example, cut at what the model holds, when nobody is served or that was so for too long."""
        if not self._queue or self._queue[0].request >= 0:
            return
        evaluation = self._queue[0]
        if not nobody and time.monotonic() - evaluation.waits_since < PATIENCE:
            return
        ids = self._examples[evaluation.next].input_ids
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)
        try:
            if evaluation.next == 0:
                self._engine.load_adapter(evaluation.model, evaluation.directory)
            ids = ids[: self._max_length - 1]
            evaluation.request = self._engine.submit(ids, sampling, evaluation.model, BACKGROUND)
        except Error as error:  # its files may have been deleted; training is none the worse
            self._fail(str(error))

    def take(self, answer: TokenEvent) -> None:
        """What was asked last."""
        evaluation = self._queue[0]
        evaluation.request, evaluation.waits_since = -1, time.monotonic()
        if answer.finish_reason in ("error", "cancelled"):
            self._fail(answer.error)
            return
        labels = self._examples[evaluation.next].labels[1:]
        for logprob, label in zip(answer.prompt_logprobs, labels, strict=False):
            if label != -100:
                evaluation.log_likelihood += logprob
                evaluation.targets += 1
        evaluation.next += 1
        if evaluation.next < len(self._examples):
            return
        loss = -evaluation.log_likelihood / max(1, evaluation.targets)
        row = self._store.get("checkpoints", evaluation.checkpoint)
        data = {"step": evaluation.step, "full_valid_loss": loss}
        with self._store.transaction():
            if row is not None:
                metrics = {**row["metrics"], "full_valid_loss": loss, "valid_loss": loss}
                self._store.update("checkpoints", evaluation.checkpoint, metrics=metrics)
            message = f"Step {evaluation.step}: validation loss={loss:.4f}"
            self._store.add_event(self._job, message, type="metrics", data=data, step=evaluation.step)
        self._end()

    def clear(self) -> None:
        """Nothing of them is left in the engine."""
        for evaluation in self._queue:
            if evaluation.request >= 0:
                self._engine.cancel(evaluation.request)
            unload(self._engine, evaluation.model)
        self._queue.clear()

    def _fail(self, why: str) -> None:
        step = self._queue[0].step
        self._end()
        message = f"Step {step}: the validation loss can't be computed: {why}"
        self._store.add_event(self._job, message, level="warn", step=step)

    def _end(self) -> None:
        unload(self._engine, self._queue.pop(0).model)


def unload(engine: Engine, name: str) -> None:
    """If it is there."""
    if any(adapter.name == name for adapter in engine.adapters()):
        engine.unload_adapter(name)
