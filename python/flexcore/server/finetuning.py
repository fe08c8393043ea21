"""Finetuning jobs as their clients see them; rows in the store, so that a restart goes on where the process ended."""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
import time
from typing import Any

from flexcore._core import Error, Example, InvalidArgument
from flexcore.server import reading
from flexcore.server.errors import ApiError, not_found
from flexcore.server.runner import EngineRunner
from flexcore.server.settings import virtual_tokens
from flexcore.server.state import ServerConfig
from flexcore.server.store import Row, Store, new_id
from flexcore.server.training import ACTIVE, Trainer

log = logging.getLogger("flexcore.server")
RETRY_SECONDS = 5.0  # until a job that storage kept from starting tries again


class JobManager:
    """On the event loop. `base` is the identity of the model that is served."""

    def __init__(self, runner: EngineRunner, store: Store, base: str, config: ServerConfig) -> None:
        model = runner.engine.model()
        self._runner, self._store, self._base, self._config = runner, store, base, config
        self._max_length, self._vocab_size = model.max_model_len, model.vocab_size
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(config.max_finetune_jobs)
        self._reading = asyncio.Semaphore(1)
        self._trainer = Trainer(
            runner, store, base, config.served_names[0], self._max_length, lambda: runner.to_loop(self._slots.release)
        )

    def create(self, request: dict[str, Any], settings: dict[str, Any], metadata: dict[str, str] | None) -> Row:
        job = new_id("ftjob")
        row = {
            "id": job,
            "created_at": int(time.time()),
            "status": "validating_files",
            "model": request["model"],
            "base": self._base,
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
        self.get(job)
        self._stop_preparing(job)
        await self._runner.call(self._trainer.cancel, job)
        return self.get(job)

    async def pause(self, job: str) -> Row:
        self.get(job)
        await self._runner.call(self._trainer.pause, job)
        self._stop_preparing(job)
        return self.get(job)

    async def resume(self, job: str) -> Row:
        self.get(job)
        await self._runner.call(self._trainer.resume, job)
        self._begin(job)
        return self.get(job)

    def restart(self) -> None:
        """Goes on with the jobs of the process before this one, in their order; those of other models wait for them."""
        query = "SELECT id FROM jobs WHERE status IN (?, ?, ?) AND base = ? AND NOT paused ORDER BY rowid"
        for row in self._store.select(query, *ACTIVE, self._base):
            self._begin(row["id"])

    async def stop(self) -> None:
        """Nothing is started any more, and what trains is kept as it is."""
        for job in list(self._preparing):
            self._stop_preparing(job)
        if self._runner.error is None:
            await self._runner.call(self._trainer.save_all)

    def uses_file(self, file: str) -> bool:
        query = "SELECT id FROM jobs WHERE status IN (?, ?, ?) AND (training_file = ? OR validation_file = ?)"
        return bool(self._store.select(query, *ACTIVE, file, file))

    def losses(self) -> dict[str, float]:
        return {training.id: training.loss for training in self._trainer.all() if training.loss is not None}

    def trains(self) -> bool:
        """Something could use a step."""
        return any(not training.trained for training in self._trainer.all())

    def estimated_finish(self, row: Row) -> int | None:
        """By the pace since it started; None before the first step."""
        training = self._trainer.find(row["id"])
        if row["status"] != "running" or training is None or row["step"] <= training.first_step:
            return None
        pace = (time.monotonic() - training.started) / (row["step"] - training.first_step)
        return int(time.time() + pace * (row["total_steps"] - row["step"]))

    def _begin(self, job: str) -> None:
        task = asyncio.create_task(self._prepare(job))
        self._preparing[job] = task

        def forget(done: asyncio.Task[None]) -> None:
            if self._preparing.get(job) is done:
                del self._preparing[job]

        task.add_done_callback(forget)

    def _stop_preparing(self, job: str) -> None:
        if (task := self._preparing.pop(job, None)) is not None:
            task.cancel()

    async def _prepare(self, job: str) -> None:
        """From its files to the engine: checked, in line, started."""
        row = self.get(job)
        try:
            data: tuple[list[Example], list[Example]] | None = await self._read(row)
            if row["status"] == "validating_files":
                with self._store.transaction():
                    self._store.update("jobs", job, status="queued")
                    self._store.add_event(job, "Files validated, moving job to queued state")
            if self._slots.locked():  # it may wait for long
                data = None
            await self._slots.acquire()
            try:
                examples, validation = data or await self._read(row)
            except BaseException:
                self._slots.release()
                raise
            await self._runner.call(self._trainer.start, job, examples, validation)
        except asyncio.CancelledError:
            raise
        except sqlite3.OperationalError:  # a full disk: the job waits for room
            log.exception("job %s", job)
            await asyncio.sleep(RETRY_SECONDS)
            self._begin(job)
        except _BadFile as error:
            self._failed(job, "invalid_" + error.param, str(error), error.param)
        except ApiError as error:
            if self._runner.error is None:  # else the next process goes on
                self._failed(job, error.code or "server_error", error.message)
        except Exception as error:
            if not isinstance(error, Error):
                log.exception("job %s", job)
            self._failed(job, "invalid_request" if isinstance(error, InvalidArgument) else "server_error", str(error))

    def _failed(self, job: str, code: str, message: str, param: str | None = None) -> None:
        if self._store.resume_directory(job).is_dir():  # what was trained is not lost with a start that fails
            self._trainer.hold(job, message)
        else:
            self._trainer.end(job, "failed", {"code": code, "message": message, "param": param})

    async def _read(self, row: Row) -> tuple[list[Example], list[Example]]:
        training = await self._read_one(row, "training_file")
        return training, await self._read_one(row, "validation_file") if row["validation_file"] else []

    async def _read_one(self, row: Row, param: str) -> list[Example]:
        file = self._store.get("files", row[param])
        if file is None:
            raise _BadFile(param, f"{param} {row[param]!r} is gone")
        settings = row["settings"]
        longest = self._max_length - virtual_tokens(settings)
        longest = min(settings.get("max_length") or longest, longest)
        path, tokenizer = self._store.path_of_file(file), self._runner.llm.tokenizer
        limit = self._config.max_dataset_bytes
        try:
            async with self._reading:
                examples, summary = await reading.read(path, tokenizer, longest, self._vocab_size, limit)
        except Error as error:
            raise _BadFile(param, str(error).replace(str(path), file["filename"])) from None
        if row["status"] == "validating_files":
            self._store.add_event(row["id"], f"{file['filename']}: {summary}")
        return examples


class _BadFile(Exception):
    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def check_suffix(suffix: str | None) -> None:
    if suffix is not None and not re.fullmatch(r"[A-Za-z0-9._-]{0,64}", suffix):
        raise ApiError(400, f"suffix: got {suffix!r}, wanted up to 64 letters, digits, '.', '_' and '-'", "suffix")
