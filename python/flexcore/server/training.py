"""What the engine trains for jobs. Everything here is on the engine's thread, but for files: a thread of their own
writes those, from copies, so that no token waits for a disk."""

from __future__ import annotations

import csv
import io
import logging
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexcore._core import (
    Error,
    Example,
    FinetuneConfig,
    FinetuneEvent,
    StepReport,
    TokenEvent,
)
from flexcore.server.errors import ApiError
from flexcore.server.evaluations import Evaluations, unload
from flexcore.server.runner import EngineRunner
from flexcore.server.settings import adapter_of, model_name, resolved, virtual_tokens
from flexcore.server.store import Row, Store, new_id

log = logging.getLogger("flexcore.server")

ACTIVE = ("validating_files", "queued", "running")
# The state that a restart goes on from is saved when that takes a twentieth of the job's time, or, so that no end costs
# more than a small share of the job, half of it.
SAVE_OVERHEAD, MOST_SAVE_OVERHEAD = 0.05, 0.5
MOST_LOST = 1 / 400  # of a job's steps


@dataclass
class Training:
    """A job that the engine has."""

    id: str
    engine_job: int
    model: str  # the adapter's name
    steps_per_epoch: int
    evaluations: Evaluations
    started: float = field(default_factory=time.monotonic)
    first_step: int = 0
    loss: float | None = None
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    save_seconds: float = 0.0
    save_failed: bool = False
    saving: bool = False  # its state is being written
    writing: int = 0  # files of it
    trained: bool = False  # what is left is to evaluate
    finishing: bool = False  # the finished model is being written


class Trainer:
    """`released` is called when the engine no longer has a job that was started."""

    def __init__(
        self,
        runner: EngineRunner,
        store: Store,
        base: str,
        served_name: str,
        max_length: int,
        released: Callable[[], None],
    ) -> None:
        self._engine, self._store, self._released = runner.engine, store, released
        self._base, self._served_name, self._max_length = base, served_name, max_length
        self._training: dict[int, Training] = {}  # by the engine's job
        self._runner = runner
        self._writer = ThreadPoolExecutor(1, "flexcore-writer")  # one thing after the other, in the order of steps
        runner.after_step.append(self._after_step)
        runner.when_idle.append(self._when_idle)

    def find(self, job: str) -> Training | None:
        """Any thread may ask."""
        return next((training for training in list(self._training.values()) if training.id == job), None)

    def all(self) -> list[Training]:
        """Any thread may ask."""
        return list(self._training.values())

    def start(self, job: str, examples: list[Example], validation: list[Example]) -> None:
        """From the state that was saved, if there is one. Raises what the engine refuses."""
        try:
            row = self._store.get("jobs", job)
            started = row is not None and row["status"] in ACTIVE and not row["paused"]
            if row is not None and started:
                self._start(row, examples, validation)
        except BaseException:
            self._released()
            raise
        if not started:
            self._released()

    def _start(self, row: Row, examples: list[Example], validation: list[Example]) -> None:
        job, settings = row["id"], row["settings"]
        config = FinetuneConfig(**resolved(settings, len(examples)), seed=settings["seed"])
        resume = self._store.resume_directory(job)
        resume.parent.mkdir(exist_ok=True)
        if resume.is_dir():
            engine_job = self._engine.resume_finetune(resume, examples)
        else:
            model = model_name(self._served_name, row["suffix"], job)
            self._engine.create_adapter(model, adapter_of(settings), settings["seed"])
            try:
                engine_job = self._engine.finetune(model, examples, config)
            except BaseException:
                self._engine.unload_adapter(model)
                raise
        info = self._engine.job(engine_job)
        steps_per_epoch = math.ceil(len(examples) / config.batch_size)
        longest = self._max_length - virtual_tokens(settings)
        evaluations = Evaluations(self._engine, self._store, job, validation, longest)
        training = Training(job, engine_job, info.adapter, steps_per_epoch, evaluations)
        training.first_step = training.saved_step = info.step
        self._training[engine_job] = training
        with self._store.transaction():
            self._store.forget_after(job, info.step)
            self._store.update("jobs", job, status="running", total_steps=info.total_steps, step=info.step)
            message = f"Going on after step {info.step}" if info.step else "Fine-tuning job started"
            self._store.add_event(job, message)
        for checkpoint in self._store.select("SELECT * FROM checkpoints WHERE job = ? ORDER BY number", job):
            if "full_valid_loss" not in checkpoint["metrics"]:
                evaluations.add(checkpoint["model"], checkpoint["id"], checkpoint["step"])

    def cancel(self, job: str) -> None:
        row = self._active(job, "cancelled")
        if (training := self.find(row["id"])) is not None:
            if training.finishing:  # it has ended then
                self._wait_for_files()
                self._active(job, "cancelled")
            self._leave(training)
        self.end(job, "cancelled")

    def pause(self, job: str) -> None:
        """Its state is saved and it leaves the engine: whoever waits in line may train."""
        row = self._active(job, "paused")
        if row["paused"]:
            raise ApiError(400, f"Job {job} is paused and can't be paused", code="job_not_running")
        training = self.find(job)
        if training is not None:
            if training.trained:
                raise ApiError(400, f"Job {job} is trained; its last evaluation runs", code="job_not_running")
            self._save_now(training)
            if training.save_failed:
                raise ApiError(507, f"Job {job} can't be paused: its state can't be saved", code="storage")
            self._leave(training)
        with self._store.transaction():
            self._store.update("jobs", job, paused=1)
            self._store.add_event(job, "Fine-tuning job paused")

    def resume(self, job: str) -> None:
        """Only the row: the job goes the way of a new one."""
        row = self._active(job, "resumed")
        if not row["paused"]:
            raise ApiError(400, f"Job {job} is not paused", code="job_not_paused")
        with self._store.transaction():
            self._store.update("jobs", job, paused=0, status="queued" if row["status"] == "running" else row["status"])
            self._store.add_event(job, "Fine-tuning job resumed")

    def save_all(self) -> None:
        for training in self.all():
            if not training.trained:
                self._save_now(training)
        self._wait_for_files()

    def _active(self, job: str, verb: str) -> Row:
        """As it is now: the step that ran meanwhile may have ended it."""
        row = self._store.get("jobs", job)
        if row is None or row["status"] not in ACTIVE:
            status = row["status"] if row is not None else "gone"
            raise ApiError(400, f"Job {job} is {status} and can't be {verb}", code="job_ended")
        return row

    def _after_step(self, report: StepReport) -> None:
        for event in report.finetune:
            if (training := self._training.get(event.job_id)) is not None:
                self._guarded(training, self._take, event)
        nobody = report.num_decode_tokens + report.num_prefill_tokens == 0
        for training in self.all():
            for answer in report.outputs:
                if training.evaluations.asked(answer.request_id):
                    self._guarded(training, self._evaluated, answer)
            self._guarded(training, self._evaluate, nobody)

    def _when_idle(self) -> None:
        for training in self.all():
            self._guarded(training, self._evaluate, True)

    def _guarded(self, training: Training, work: Callable[[Training, Any], None], event: Any = None) -> None:
        """What the disk or the database refuses costs the job its turn, not its progress."""
        try:
            if training.engine_job in self._training:
                work(training, event)
        except Exception as error:
            log.exception("job %s", training.id)
            try:
                self._leave(training)
                self.hold(training.id, f"{type(error).__name__}: {error}")
            except Exception:
                log.exception("job %s: its pause can't be written", training.id)

    def _take(self, training: Training, event: FinetuneEvent) -> None:
        if event.target_tokens:
            training.loss = event.loss
            self._record(training, event)
            if event.step % training.steps_per_epoch == 0:
                self._checkpoint(training, event)
        if event.status == "succeeded":
            training.trained = True
            self._finish_if_done(training)
        elif event.status == "failed":
            message = self._engine.job(training.engine_job).error
            self._leave(training)
            self.end(training.id, "failed", {"code": "training_failed", "message": message, "param": None})
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
        if training.saving:
            return False
        spent = time.monotonic() - training.saved_at
        many = step - training.saved_step >= MOST_LOST * self._engine.job(training.engine_job).total_steps
        many = many and self._engine.stats()["requests_running"] == 0  # whom even the copy would hold up
        return spent * (MOST_SAVE_OVERHEAD if many else SAVE_OVERHEAD) >= training.save_seconds

    def _write(
        self, training: Training, work: Callable[[], None], then: Callable[[Training, Exception | None], None]
    ) -> None:
        """`then`, on the engine's thread, with what went wrong, unless the job has left."""
        training.writing += 1

        def written(error: Exception | None) -> None:
            training.writing -= 1
            self._guarded(training, then, error)
            self._guarded(training, self._finish_if_done)

        def write() -> None:
            error = None
            try:
                work()
            except Exception as caught:
                error = caught
            self._runner.post(lambda: written(error))

        self._writer.submit(write)

    def _wait_for_files(self) -> None:
        self._writer.submit(lambda: None).result()

    def _save(self, training: Training) -> None:
        """What a restart goes on from."""
        begin = time.monotonic()
        snapshot = self._engine.snapshot_job(training.engine_job)
        copied = time.monotonic() - begin
        directory = self._store.resume_directory(training.id)
        seconds = [copied]

        def write() -> None:
            start = time.monotonic()
            snapshot.save_checkpoint(directory)
            seconds.append(time.monotonic() - start)

        def written(training: Training, error: Exception | None) -> None:
            training.saving = False
            self._saved(training, snapshot.step, sum(seconds), error)

        training.saving = True
        self._write(training, write, written)

    def _save_now(self, training: Training) -> None:
        """The same at once: the job stops here."""
        self._wait_for_files()
        begin, error = time.monotonic(), None
        snapshot = self._engine.snapshot_job(training.engine_job)
        try:
            snapshot.save_checkpoint(self._store.resume_directory(training.id))
        except Error as caught:
            error = caught
        self._saved(training, snapshot.step, time.monotonic() - begin, error)

    def _saved(self, training: Training, step: int, seconds: float, error: Exception | None) -> None:
        training.saved_at, training.save_seconds = time.monotonic(), seconds
        if error is None:
            training.saved_step = step
        elif not isinstance(error, Error):
            raise error
        elif not training.save_failed:
            self._store.add_event(training.id, f"The job's state can't be saved: {error}", level="warn")
        training.save_failed = error is not None

    def _checkpoint(self, training: Training, event: FinetuneEvent) -> None:
        """A model as of this step, which can be asked by its name."""
        name = f"{training.model}@{event.step}"
        directory = self._store.adapter_directory(training.id, event.step)
        snapshot = self._engine.snapshot_job(training.engine_job, optimizer=False)
        row: Row = {"id": new_id("ftckpt"), "job": training.id, "created_at": int(time.time()), "step": event.step}
        metrics = {"step": event.step, "train_loss": event.loss}

        def write() -> None:
            snapshot.save_adapter(directory)
            with self._store.transaction():
                if not self._is_active(training.id):
                    shutil.rmtree(directory, ignore_errors=True)
                    return
                self._store.insert("checkpoints", {**row, "model": name, "metrics": metrics})
                self._add_model(name, training, directory)
                self._store.add_event(training.id, f"Checkpoint created at step {event.step}", step=event.step)

        def written(training: Training, error: Exception | None) -> None:
            if error is not None:
                raise error
            training.evaluations.add(name, row["id"], event.step)

        self._write(training, write, written)

    def _is_active(self, job: str) -> bool:
        row = self._store.get("jobs", job)
        return row is not None and row["status"] in ACTIVE

    def _evaluate(self, training: Training, nobody: bool) -> None:
        training.evaluations.go_on(nobody)

    def _evaluated(self, training: Training, answer: TokenEvent) -> None:
        training.evaluations.take(answer)
        self._finish_if_done(training)

    def _finish_if_done(self, training: Training, _: None = None) -> None:
        if training.trained and not (training.finishing or training.writing or training.evaluations):
            self._finish(training)

    def _add_model(self, name: str, training: Training, directory: Path) -> None:
        now = int(time.time())
        row = {"name": name, "created_at": now, "base": self._base, "job": training.id, "directory": directory.name}
        self._store.insert("models", row)

    def _finish(self, training: Training) -> None:
        training.finishing = True
        directory = self._store.adapter_directory(training.id)
        snapshot = self._engine.snapshot_job(training.engine_job, optimizer=False)
        trained = self._engine.job(training.engine_job).trained_tokens

        def write() -> None:
            snapshot.save_adapter(directory)
            result = self._store.add_file(self._results(training), "step_metrics.csv", "fine-tune-results")
            with self._store.transaction():
                self._add_model(training.model, training, directory)
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

        def written(training: Training, error: Exception | None) -> None:
            if error is not None:
                raise error
            self._leave(training)
            self._remove_state(training.id)

        self._write(training, write, written)

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

    def _leave(self, training: Training) -> None:
        """The engine no longer has the job, nor anything of it."""
        if self._training.pop(training.engine_job, None) is None:
            return
        self._released()
        if self._engine.job(training.engine_job).status in ("queued", "running", "paused"):
            self._engine.cancel_job(training.engine_job)
        training.evaluations.clear()
        unload(self._engine, training.model)

    def hold(self, job: str, why: str) -> None:
        """Paused by what went wrong outside of it, with what was trained kept. Any thread may call it."""
        with self._store.transaction():
            self._store.update("jobs", job, paused=1)
            self._store.add_event(job, f"Paused: {why}. The job can be resumed", level="error")

    def end(self, job: str, status: str, error: dict[str, Any] | None = None) -> None:
        """Any thread may call it."""
        message = f"The job failed: {error['message']}" if error else f"The job was {status}"
        try:
            with self._store.transaction():
                self._store.update("jobs", job, status=status, finished_at=int(time.time()), error=error, paused=0)
                self._store.add_event(job, message, level="error" if error else "info")
        except Exception:
            log.exception("job %s: its end can't be written", job)
            return
        self._remove_state(job)

    def _remove_state(self, job: str) -> None:
        """After what is being written now."""
        self._writer.submit(shutil.rmtree, self._store.resume_directory(job).parent, ignore_errors=True)
