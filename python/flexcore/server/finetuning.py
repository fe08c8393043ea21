"""Finetuning jobs: what the engine trains, kept in the store so that a restart goes on where the process ended."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexcore import datasets
from flexcore._core import (
    Error,
    Example,
    FinetuneConfig,
    FinetuneEvent,
    InvalidArgument,
    LoraConfig,
    SamplingParams,
    StepReport,
    TokenEvent,
)
from flexcore.server.errors import ApiError, not_found
from flexcore.server.runner import EngineRunner
from flexcore.server.store import Row, Store, new_id

log = logging.getLogger("flexcore.server")

ACTIVE = ("validating_files", "queued", "running")
LEARNING_RATE = 2e-4  # times learning_rate_multiplier
BACKGROUND = "flexcore-background"  # the class of requests that nobody waits for
# The state that a restart goes on from is saved when that takes a twentieth of the job's time, or, so that no end costs
# more than a small share of the job, half of it.
SAVE_OVERHEAD, MOST_SAVE_OVERHEAD = 0.05, 0.5
MOST_LOST = 1 / 400  # of a job's steps


@dataclass
class Evaluation:
    """The validation file under a checkpoint, one example after the other in the serving path, where they cost others
    nothing that was promised to them."""

    model: str
    checkpoint: str
    step: int
    next: int = 0
    request: int = -1
    log_likelihood: float = 0.0
    targets: int = 0


@dataclass
class Training:
    """A job that the engine has. Its fields belong to the engine's thread."""

    id: str
    engine_job: int
    model: str  # the adapter's name
    steps_per_epoch: int
    validation: list[Example]
    started: float = field(default_factory=time.monotonic)
    first_step: int = 0
    loss: float | None = None
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    save_seconds: float = 0.0
    trained_before: int = 0
    save_failed: bool = False
    evaluations: list[Evaluation] = field(default_factory=list)
    trained: bool = False  # what is left is to evaluate


class JobManager:
    """Coroutines run on the event loop, methods that say so on the engine's thread."""

    def __init__(self, runner: EngineRunner, store: Store, base: str, max_jobs: int, max_length: int) -> None:
        self._runner, self._engine, self._store = runner, runner.engine, store
        self._base, self._max_jobs, self._max_length = base, max_jobs, max_length
        self._training: dict[int, Training] = {}  # by the engine's job
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(max_jobs)
        self._unpaused: dict[str, asyncio.Event] = {}
        runner.after_step.append(self._after_step)

    # The API, on the event loop

    def create(self, request: dict[str, Any], settings: dict[str, Any], metadata: dict[str, str] | None) -> Row:
        job = new_id("ftjob")
        row = {
            "id": job,
            "created_at": int(time.time()),
            "status": "validating_files",
            "model": request["model"],
            "suffix": request.get("suffix"),
            "seed": settings["seed"],
            "training_file": request["training_file"],
            "validation_file": request.get("validation_file"),
            "request": request,
            "settings": settings,
            "metadata": metadata or {},
        }
        with self._store.transaction():
            self._store.insert("jobs", row)
            self._store.add_event(job, f"Created fine-tuning job: {job}")
        self._begin(job)
        return self.get(job)

    def get(self, job: str) -> Row:
        row = self._store.get("jobs", job)
        if row is None:
            raise not_found("fine-tuning job", job)
        return row

    async def cancel(self, job: str) -> Row:
        row = self.get(job)
        if row["status"] not in ACTIVE:
            raise ApiError(400, f"Job {job} is {row['status']} and can't be cancelled", code="job_ended")
        if (task := self._preparing.pop(job, None)) is not None:
            task.cancel()
        await self._runner.call(self._cancel, job)
        return self.get(job)

    async def pause(self, job: str) -> Row:
        row = self.get(job)
        if row["status"] not in ACTIVE or row["paused"]:
            state = "paused" if row["paused"] else row["status"]
            raise ApiError(400, f"Job {job} is {state} and can't be paused", code="job_not_running")
        await self._runner.call(self._pause, job)
        return self.get(job)

    async def resume(self, job: str) -> Row:
        row = self.get(job)
        if row["status"] not in ACTIVE or not row["paused"]:
            raise ApiError(400, f"Job {job} is not paused", code="job_not_paused")
        await self._runner.call(self._resume, job)
        if (event := self._unpaused.get(job)) is not None:
            event.set()
        return self.get(job)

    def restart(self) -> None:
        """Goes on with the jobs of the process before this one, in their order."""
        for row in self._store.select("SELECT id FROM jobs WHERE status IN (?, ?, ?) ORDER BY rowid", *ACTIVE):
            self._begin(row["id"])

    def uses_file(self, file: str) -> bool:
        query = "SELECT id FROM jobs WHERE status IN (?, ?, ?) AND (training_file = ? OR validation_file = ?)"
        return bool(self._store.select(query, *ACTIVE, file, file))

    def _begin(self, job: str) -> None:
        task = asyncio.create_task(self._prepare(job))
        self._preparing[job] = task
        task.add_done_callback(lambda _: self._preparing.pop(job, None))

    async def _prepare(self, job: str) -> None:
        """From its files to the engine: checked, in line, started."""
        row = self.get(job)
        try:
            examples = await self._load(row, "training_file")
            validation = await self._load(row, "validation_file") if row["validation_file"] else []
            if row["status"] == "validating_files":
                with self._store.transaction():
                    self._store.update("jobs", job, status="queued")
                    self._store.add_event(job, "Files validated, moving job to queued state")
            unpaused = self._unpaused.setdefault(job, asyncio.Event())
            while True:
                if self.get(job)["paused"]:
                    unpaused.clear()
                    await unpaused.wait()
                await self._slots.acquire()
                if not self.get(job)["paused"]:
                    break
                self._slots.release()
            await self._runner.call(self._start, self.get(job), examples, validation)
        except asyncio.CancelledError:
            raise
        except _BadFile as error:
            self._end(job, "failed", {"code": "invalid_" + error.param, "message": str(error), "param": error.param})
        except ApiError as error:
            if self._runner.error is None:  # else the next process goes on
                self._end(
                    job, "failed", {"code": error.code or "server_error", "message": error.message, "param": None}
                )
        except Exception as error:
            code = "invalid_request" if isinstance(error, InvalidArgument) else "server_error"
            if not isinstance(error, Error):
                log.exception("job %s", job)
            self._end(job, "failed", {"code": code, "message": str(error), "param": None})
        finally:
            self._unpaused.pop(job, None)

    async def _load(self, row: Row, param: str) -> list[Example]:
        file = self._store.get("files", row[param])
        if file is None:
            raise _BadFile(param, f"{param} {row[param]!r} is gone")
        longest = row["settings"].get("max_length") or self._max_length
        try:
            dataset = await asyncio.to_thread(self._read, file, longest)
        except InvalidArgument as error:
            path = str(self._store.path_of_file(file))
            raise _BadFile(param, str(error).replace(path, file["filename"])) from None
        if param == "training_file" and row["status"] == "validating_files":
            self._store.add_event(row["id"], f"{file['filename']}: {dataset.summary()}")
        return dataset.examples

    def _read(self, file: Row, longest: int) -> datasets.Dataset:
        return datasets.load(self._store.path_of_file(file), self._runner.llm.tokenizer, longest)

    async def stop(self) -> None:
        """Nothing is started any more, and what trains is kept as it is."""
        for task in list(self._preparing.values()):
            task.cancel()
        if self._runner.error is None:
            await self._runner.call(self._save_all)

    def losses(self) -> dict[str, float]:
        return {each.id: each.loss for each in list(self._training.values()) if each.loss is not None}

    # On the engine's thread

    def _save_all(self) -> None:
        for training in self._training.values():
            if not training.trained:
                self._save(training)

    def _start(self, row: Row, examples: list[Example], validation: list[Example]) -> None:
        """With a slot, which is the training's from here on."""
        try:
            self._train(row, examples, validation)
        except BaseException:
            self._runner.to_loop(self._slots.release)
            raise

    def _train(self, row: Row, examples: list[Example], validation: list[Example]) -> None:
        job, settings = row["id"], row["settings"]
        model = model_name(self._base, row["suffix"], job)
        config = FinetuneConfig(**resolved(settings, len(examples)), seed=settings["seed"])
        resume = self._store.resume_directory(job)
        resume.parent.mkdir(exist_ok=True)
        first = 0
        if resume.is_dir():
            engine_job = self._engine.resume_finetune(resume, examples)
            first = self._engine.job(engine_job).step
        else:
            self._engine.create_adapter(model, LoraConfig(**settings["lora"]), settings["seed"])
            try:
                engine_job = self._engine.finetune(model, examples, config)
            except BaseException:
                self._engine.unload_adapter(model)
                raise
        training = Training(job, engine_job, model, math.ceil(len(examples) / config.batch_size), validation)
        training.first_step = first
        info = self._engine.job(engine_job)
        training.trained_before = info.trained_tokens
        self._training[engine_job] = training
        with self._store.transaction():
            self._store.forget_after(job, first)
            self._store.update("jobs", job, status="running", total_steps=info.total_steps, step=first)
            self._store.add_event(job, f"Going on after step {first}" if first else "Fine-tuning job started")

    def _find(self, job: str) -> Training | None:
        return next((training for training in list(self._training.values()) if training.id == job), None)

    def _cancel(self, job: str) -> None:
        training = self._find(job)
        if training is not None:
            if not training.trained:
                self._engine.cancel_job(training.engine_job)
            self._leave(training)
            self._unload(training.model)
        self._end(job, "cancelled", None)

    def _pause(self, job: str) -> None:
        training = self._find(job)
        if training is not None:
            if training.trained:
                raise ApiError(400, f"Job {job} is trained; its last evaluation runs", code="job_not_running")
            self._engine.pause_job(training.engine_job)
            self._save(training)
        with self._store.transaction():
            self._store.update("jobs", job, paused=1)
            self._store.add_event(job, "Fine-tuning job paused")

    def _resume(self, job: str) -> None:
        training = self._find(job)
        if training is not None:
            self._engine.resume_job(training.engine_job)
            training.started, training.first_step = time.monotonic(), self._engine.job(training.engine_job).step
        with self._store.transaction():
            self._store.update("jobs", job, paused=0)
            self._store.add_event(job, "Fine-tuning job resumed")

    def _after_step(self, report: StepReport) -> None:
        for event in report.finetune:
            if (training := self._training.get(event.job_id)) is not None:
                self._guarded(training, self._take, event)
        for training in [each for each in self._training.values() if each.evaluations]:
            for answer in report.outputs:
                if training.evaluations and answer.request_id == training.evaluations[0].request:
                    self._guarded(training, self._evaluated, answer)

    def _guarded(self, training: Training, work: Callable[[Training, Any], None], event: Any) -> None:
        try:
            work(training, event)
        except Exception as error:  # a full disk, say: this job fails, the engine goes on
            log.exception("job %s", training.id)
            self._fail(training, f"{type(error).__name__}: {error}")

    def _take(self, training: Training, event: FinetuneEvent) -> None:
        if event.target_tokens:
            training.loss = event.loss
            self._record(training, event)
            if event.step % training.steps_per_epoch == 0:
                self._checkpoint(training, event)
        if event.status == "succeeded":
            training.trained = True
            if not training.evaluations:
                self._succeed(training)
        elif event.status == "failed":
            self._fail(training, self._engine.job(training.engine_job).error)
        elif event.target_tokens and self._should_save(training, event.step):
            self._save(training)

    def _record(self, training: Training, event: FinetuneEvent) -> None:
        info = self._engine.job(training.engine_job)
        data = {
            "step": event.step,
            "total_steps": info.total_steps,
            "train_loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
        }
        message = f"Step {event.step}/{info.total_steps}: training loss={event.loss:.4f}"
        with self._store.transaction():
            self._store.add_event(training.id, message, type="metrics", data=data, step=event.step)
            self._store.update("jobs", training.id, step=event.step, trained_tokens=info.trained_tokens)

    def _should_save(self, training: Training, step: int) -> bool:
        spent = time.monotonic() - training.saved_at
        many = step - training.saved_step >= MOST_LOST * self._engine.job(training.engine_job).total_steps
        return spent * (MOST_SAVE_OVERHEAD if many else SAVE_OVERHEAD) >= training.save_seconds

    def _save(self, training: Training) -> None:
        """What a restart goes on from."""
        begin = time.monotonic()
        training.saved_step = self._engine.job(training.engine_job).step
        try:
            self._engine.save_checkpoint(training.engine_job, self._store.resume_directory(training.id))
            training.save_failed = False
        except Error as error:
            if not training.save_failed:
                self._store.add_event(training.id, f"The job's state can't be saved: {error}", level="warn")
            training.save_failed = True
        training.saved_at = time.monotonic()
        training.save_seconds = training.saved_at - begin

    def _checkpoint(self, training: Training, event: FinetuneEvent) -> None:
        """A model as of this step, which can be asked by its name."""
        name = f"{training.model}@{event.step}"
        directory = self._store.adapter_directory(training.id, event.step)
        self._engine.save_adapter(training.model, directory)
        row: Row = {"id": new_id("ftckpt"), "job": training.id, "created_at": int(time.time()), "step": event.step}
        metrics = {"step": event.step, "train_loss": event.loss}
        with self._store.transaction():
            self._store.insert("checkpoints", {**row, "model": name, "metrics": metrics})
            self._add_model(name, training, directory.name)
            self._store.add_event(training.id, f"Checkpoint created at step {event.step}", step=event.step)
        if training.validation:
            evaluation = Evaluation(f"{name} (evaluation)", row["id"], event.step)
            self._engine.load_adapter(evaluation.model, directory)
            training.evaluations.append(evaluation)
            if len(training.evaluations) == 1:
                self._evaluate(training)

    def _evaluate(self, training: Training) -> None:
        """The next example."""
        evaluation = training.evaluations[0]
        ids = training.validation[evaluation.next].input_ids
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True)
        evaluation.request = self._engine.submit(ids[: self._max_length - 1], sampling, evaluation.model, BACKGROUND)

    def _evaluated(self, training: Training, answer: TokenEvent) -> None:
        evaluation = training.evaluations[0]
        labels = training.validation[evaluation.next].labels[1:]
        for logprob, label in zip(answer.prompt_logprobs, labels, strict=False):
            if label != -100:
                evaluation.log_likelihood += logprob
                evaluation.targets += 1
        evaluation.next += 1
        if evaluation.next < len(training.validation):
            self._evaluate(training)
            return
        training.evaluations.pop(0)
        loss = -evaluation.log_likelihood / max(1, evaluation.targets)
        row = self._store.get("checkpoints", evaluation.checkpoint)
        data = {"step": evaluation.step, "full_valid_loss": loss}
        with self._store.transaction():
            if row is not None:
                metrics = {**row["metrics"], "full_valid_loss": loss, "valid_loss": loss}
                self._store.update("checkpoints", evaluation.checkpoint, metrics=metrics)
            message = f"Step {evaluation.step}: validation loss={loss:.4f}"
            self._store.add_event(training.id, message, type="metrics", data=data, step=evaluation.step)
        self._unload(evaluation.model)
        if training.evaluations:
            self._evaluate(training)
        elif training.trained:
            self._succeed(training)

    def _unload(self, name: str) -> None:
        if any(adapter.name == name for adapter in self._engine.adapters()):
            self._engine.unload_adapter(name)

    def _add_model(self, name: str, training: Training, directory: str) -> None:
        now = int(time.time())
        row = {"name": name, "created_at": now, "base": self._base, "job": training.id, "directory": directory}
        self._store.insert("models", row)

    def _succeed(self, training: Training) -> None:
        directory = self._store.adapter_directory(training.id)
        self._engine.save_adapter(training.model, directory)
        trained = self._engine.job(training.engine_job).trained_tokens
        result = self._store.add_file(self._results(training), "step_metrics.csv", "fine-tune-results")
        with self._store.transaction():
            self._add_model(training.model, training, directory.name)
            self._store.update(
                "jobs",
                training.id,
                status="succeeded",
                finished_at=int(time.time()),
                fine_tuned_model=training.model,
                trained_tokens=trained,
                result_files=[result["id"]],
            )
            self._store.add_event(training.id, f"New fine-tuned model created: {training.model}")
            self._store.add_event(training.id, "The job has successfully completed")
        self._leave(training)
        shutil.rmtree(self._store.resume_directory(training.id).parent, ignore_errors=True)

    def _results(self, training: Training) -> bytes:
        query = "SELECT data FROM events WHERE job = ? AND type = 'metrics' ORDER BY number"
        out = io.StringIO()
        writer = csv.writer(out)
        names = ("step", "train_loss", "learning_rate", "grad_norm")
        writer.writerow([*names, "valid_loss"])
        rows = [row["data"] for row in self._store.select(query, training.id)]
        valid = {data["step"]: data["full_valid_loss"] for data in rows if "full_valid_loss" in data}
        for data in rows:
            if "train_loss" in data:
                writer.writerow([*(data[name] for name in names), valid.get(data["step"])])
        return out.getvalue().encode()

    def _fail(self, training: Training, message: str) -> None:
        if self._engine.job(training.engine_job).status in ("queued", "running", "paused"):
            self._engine.cancel_job(training.engine_job)
        self._leave(training)
        if self._store.get("models", training.model) is None:
            self._unload(training.model)
        self._end(training.id, "failed", {"code": "training_failed", "message": message, "param": None})

    def _leave(self, training: Training) -> None:
        """The engine no longer trains it: the next in line may."""
        for evaluation in training.evaluations:
            if evaluation.request >= 0:
                self._engine.cancel(evaluation.request)
            self._unload(evaluation.model)
        training.evaluations.clear()
        if self._training.pop(training.engine_job, None) is not None:
            self._runner.to_loop(self._slots.release)

    # On either thread

    def _end(self, job: str, status: str, error: dict[str, Any] | None) -> None:
        message = f"The job failed: {error['message']}" if error else f"The job was {status}"
        try:
            with self._store.transaction():
                self._store.update("jobs", job, status=status, finished_at=int(time.time()), error=error, paused=0)
                self._store.add_event(job, message, level="error" if error else "info")
        except Exception:
            log.exception("job %s: its end can't be written", job)
            return
        shutil.rmtree(self._store.resume_directory(job).parent, ignore_errors=True)

    def estimated_finish(self, row: Row) -> int | None:
        """By the pace since it started; None before the first step."""
        training = self._find(row["id"])
        if row["status"] != "running" or training is None or row["paused"] or row["step"] <= training.first_step:
            return None
        pace = (time.monotonic() - training.started) / (row["step"] - training.first_step)
        return int(time.time() + pace * (row["total_steps"] - row["step"]))


class _BadFile(Exception):
    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def model_name(base: str, suffix: str | None, job: str) -> str:
    return f"ft:{base}:{suffix or ''}:{job.removeprefix('ftjob-')[:12]}"


def resolved(settings: dict[str, Any], num_examples: int) -> dict[str, Any]:
    """FinetuneConfig fields, with a number in the place of each "auto"."""
    auto = {
        "n_epochs": min(10, max(1, math.ceil(100 / num_examples))) if num_examples < 100 else 3,
        "batch_size": min(8, max(1, num_examples // 16)),
        "learning_rate_multiplier": 1.0,
    }
    chosen = {name: auto[name] if settings[name] == "auto" else settings[name] for name in auto}
    return {
        "num_epochs": chosen["n_epochs"],
        "batch_size": chosen["batch_size"],
        "learning_rate": LEARNING_RATE * chosen["learning_rate_multiplier"],
        **settings["training"],
    }


def check_suffix(suffix: str | None) -> None:
    if suffix is not None and not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", suffix):
        raise ApiError(400, f"suffix: got {suffix!r}, wanted up to 64 letters, digits, '.', '_' and '-'", "suffix")
