"""Files, jobs, events, checkpoints and finetuned models: one SQLite database and the files beside it, in one directory.

    DIR/flexcore.db           rows
    DIR/files/<id>.jsonl      what was uploaded, and results
    DIR/jobs/<id>/resume      adapter, optimizer state and position of the last steps, for a restart
    DIR/adapters/<id>[@step]  PEFT directories of finetuned models and their checkpoints

A file is whole before its row is there, and its row is gone before the file is: whatever kills the process, no row
names half a file. One process at a time has the directory; what is not the store's own in it is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

from flexcore import Error

VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS files (
  id TEXT PRIMARY KEY, created_at INTEGER, filename TEXT, purpose TEXT, bytes INTEGER);
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, created_at INTEGER, finished_at INTEGER, status TEXT, paused INTEGER DEFAULT 0, model TEXT,
  base TEXT,
  suffix TEXT, seed INTEGER, training_file TEXT, validation_file TEXT, request TEXT, settings TEXT, metadata TEXT,
  fine_tuned_model TEXT, result_files TEXT DEFAULT '[]', step INTEGER DEFAULT 0, total_steps INTEGER DEFAULT 0,
  trained_tokens INTEGER DEFAULT 0, error TEXT);
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, job TEXT, created_at INTEGER, level TEXT, type TEXT,
  message TEXT, data TEXT, step INTEGER);
CREATE INDEX IF NOT EXISTS events_of_job ON events (job, number);
CREATE TABLE IF NOT EXISTS checkpoints (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, job TEXT, created_at INTEGER, step INTEGER, model TEXT,
  metrics TEXT);
CREATE TABLE IF NOT EXISTS models (
  name TEXT PRIMARY KEY, created_at INTEGER, base TEXT, job TEXT, directory TEXT);
"""
_JSON = ("request", "settings", "metadata", "result_files", "error", "data", "metrics")
_MOST_GONE = 10_000
_SUFFIXES = (".jsonl.gz", ".json.gz", ".ndjson.gz", ".json", ".csv")
Row = dict[str, Any]


def _key_of(table: str) -> str:
    return "name" if table == "models" else "id"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


class Store:
    """Any thread may call it. Raises OSError and sqlite3.Error when the disk is full or broken."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._alone = _lock(directory)
        is_new = not (directory / "flexcore.db").exists()
        for name in ("files", "jobs", "adapters"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._gone: dict[tuple[str, str], int] = {}  # places of rows that were deleted
        try:
            self._db = sqlite3.connect(directory / "flexcore.db", check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, VERSION):
                raise Error(f"data directory: {directory} is of version {found}, wanted {VERSION}")
            self._db.executescript(_TABLES)
            self._db.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.DatabaseError as error:
            raise Error(f"data directory: {directory / 'flexcore.db'}: {error}") from error
        if not is_new:
            self._remove_leftovers()

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._alone.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; may be nested."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    # Rows

    def insert(self, table: str, row: Mapping[str, Any]) -> None:
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        self._execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", [_stored(value) for value in row.values()])

    def update(self, table: str, key: str, **changes: Any) -> None:
        names = ", ".join(f"{name} = ?" for name in changes)
        values = [*(_stored(value) for value in changes.values()), key]
        self._execute(f"UPDATE {table} SET {names} WHERE {_key_of(table)} = ?", values)

    def get(self, table: str, key: str) -> Row | None:
        rows = self.select(f"SELECT * FROM {table} WHERE {_key_of(table)} = ?", key)
        return rows[0] if rows else None

    def delete(self, table: str, key: str) -> None:
        with self._lock:
            if (place := self.place(table, key)) is not None:
                self._gone[table, key] = place
                while len(self._gone) > _MOST_GONE:
                    del self._gone[next(iter(self._gone))]
            self._execute(f"DELETE FROM {table} WHERE {_key_of(table)} = ?", [key])

    def place(self, table: str, key: str) -> int | None:
        """In the order of making; also of what was deleted lately, so that a list can go on behind it."""
        with self._lock:
            row = self._db.execute(f"SELECT rowid FROM {table} WHERE {_key_of(table)} = ?", [key]).fetchone()
        return self._gone.get((table, key)) if row is None else int(row[0])

    def select(self, query: str, *values: Any) -> list[Row]:
        with self._lock:
            rows = self._db.execute(query, values).fetchall()
        return [{name: _loaded(name, row[name]) for name in row.keys()} for row in rows]  # noqa: SIM118

    def execute(self, query: str, *values: Any) -> None:
        self._execute(query, values)

    def _execute(self, query: str, values: Sequence[Any]) -> None:
        with self._lock:
            self._db.execute(query, values)

    # Files

    def path_of_file(self, row: Row) -> Path:
        """The suffix tells a reader what it is."""
        suffixes = "".join(Path(row["filename"]).suffixes[-2:]).lower()
        known = next((suffix for suffix in _SUFFIXES if suffixes.endswith(suffix)), ".jsonl")
        return self.directory / "files" / f"{row['id']}{known}"

    def add_file(self, source: BinaryIO | bytes, filename: str, purpose: str) -> Row:
        """Copies it in; may take a while."""
        row: Row = {"id": new_id("file"), "created_at": int(time.time()), "filename": filename, "purpose": purpose}
        path = self.path_of_file(row)
        partial = path.with_name(row["id"] + ".partial")
        try:
            with partial.open("wb") as out:
                if isinstance(source, bytes):
                    out.write(source)
                else:
                    shutil.copyfileobj(source, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
            row["bytes"] = partial.stat().st_size
            partial.rename(path)
            self.insert("files", row)
        except BaseException:
            for leftover in (partial, path):
                leftover.unlink(missing_ok=True)
            raise
        return row

    def delete_file(self, row: Row) -> None:
        self.delete("files", row["id"])
        self.path_of_file(row).unlink(missing_ok=True)

    # Jobs

    def resume_directory(self, job: str) -> Path:
        return self.directory / "jobs" / job / "resume"

    def adapter_directory(self, job: str, step: int | None = None) -> Path:
        return self.directory / "adapters" / (job if step is None else f"{job}@{step}")

    def add_event(
        self,
        job: str,
        message: str,
        level: str = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
        step: int = 0,
    ) -> None:
        row = {"id": new_id("ftevent"), "job": job, "created_at": int(time.time()), "level": level, "type": type}
        self.insert("events", {**row, "message": message, "data": dict(data or {}), "step": step})

    def forget_after(self, job: str, step: int) -> None:
        """What was written of steps that will be made again."""
        with self.transaction():
            self.execute("DELETE FROM events WHERE job = ? AND step > ?", job, step)
            self.execute(
                "DELETE FROM models WHERE name IN (SELECT model FROM checkpoints WHERE job = ? AND step > ?)", job, step
            )
            self.execute("DELETE FROM checkpoints WHERE job = ? AND step > ?", job, step)

    def _remove_leftovers(self) -> None:
        """Of writes that were cut short: files of ours without a row."""
        files = {self.path_of_file(row).name for row in self.select("SELECT * FROM files")}
        adapters = {row["directory"] for row in self.select("SELECT directory FROM models")}
        jobs = {row["id"] for row in self.select("SELECT id FROM jobs WHERE finished_at IS NULL")}
        for folder, form, known in (("files", "file", files), ("adapters", "ftjob", adapters), ("jobs", "ftjob", jobs)):
            for path in (self.directory / folder).iterdir():
                if path.name in known or not re.match(rf"\.?{form}-[0-9a-f]{{24}}\b", path.name):
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def identity(model: Path) -> str:
    """Of a model's weights and configuration: adapters of one are none of another. Looks at a sample of the weights."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def _lock(directory: Path) -> IO[str]:
    """Held until it is closed, or the process ends."""
    file = (directory / "lock").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not on this system
        pass
    except OSError:
        file.close()
        raise Error(f"data directory: {directory} is used by another process; give each its own --data-dir") from None
    return file


def _stored(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


def _loaded(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON and isinstance(value, str) else value
