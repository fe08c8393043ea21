"""What `model` may name: the base model, adapters that were loaded, finetuned models and their checkpoints."""

from __future__ import annotations

import asyncio
import functools
import shutil
import time
from pathlib import Path
from typing import Any

from flexcore.server.errors import ApiError, not_found
from flexcore.server.runner import Adapter, EngineRunner
from flexcore.server.store import Row, Store


def _missing(name: str) -> ApiError:
    return ApiError(404, f"The model `{name}` does not exist", "model", "model_not_found")


class Models:
    """Finetuned models are loaded when they are asked for; the one that was not asked for longest makes room."""

    def __init__(self, runner: EngineRunner, store: Store, base: str, names: list[str], max_loras: int) -> None:
        self.names = names  # of the base model
        self._base = base  # its identity: models of others are not there
        self._runner, self._engine, self._store = runner, runner.engine, store
        self._max_loras = max_loras
        self._given: dict[str, tuple[str, int]] = {}  # loaded by name: directory and time
        self._used: dict[str, float] = {}  # finetuned models that are loaded
        self._created = int(time.time())

    def resolve(self, name: str) -> Adapter:
        """Whom a request asks that names a model."""
        if name in self.names:
            return Adapter()
        if name in self._given:
            return Adapter(name)
        row = self._find(name)
        if row is None:
            raise _missing(name)
        directory = self._store.directory / "adapters" / row["directory"]
        return Adapter(name, functools.partial(self._load, name, directory))

    def _find(self, name: str) -> Row | None:
        row = self._store.get("models", name)
        return row if row is not None and row["base"] == self._base else None

    def _load(self, name: str, directory: Path) -> None:
        """On the engine's thread."""
        if self._find(name) is None:  # deleted since it was resolved
            raise _missing(name)
        loaded = {adapter.name: adapter for adapter in self._engine.adapters()}
        if name not in loaded:
            idle = [n for n in self._used if n in loaded and not loaded[n].training]
            while idle and len(loaded) >= self._max_loras:
                oldest = min(idle, key=lambda n: self._used[n])
                self._engine.unload_adapter(oldest)  # requests that run on it keep it
                idle.remove(oldest)
                del self._used[oldest], loaded[oldest]
            self._engine.load_adapter(name, directory)
        self._used[name] = time.monotonic()

    async def load(self, name: str, directory: str, replace: bool) -> None:
        if name in self.names or self._find(name) is not None:
            raise ApiError(400, f"lora_name: {name!r} is the name of another model", "lora_name", "model_exists")
        if name in self._given and not replace:
            raise ApiError(400, f"The lora adapter '{name}' has already been loaded", "lora_name", "model_exists")
        await self._runner.call(self._replace, name, directory)
        self.given(name, directory)

    def _replace(self, name: str, directory: str) -> None:
        """The one before stays until the new one is known to be good."""
        if any(adapter.name == name for adapter in self._engine.adapters()):
            trial = f"{name} (loading)"
            self._engine.load_adapter(trial, directory)
            self._engine.unload_adapter(trial)
            self._engine.unload_adapter(name)
        self._engine.load_adapter(name, directory)

    def given(self, name: str, directory: str) -> None:
        """The engine has an adapter of this name."""
        self._given[name] = (directory, int(time.time()))

    async def unload(self, name: str) -> None:
        if name not in self._given:
            raise not_found("lora adapter", name, "lora_name")
        del self._given[name]
        await self._runner.call(self._unload_if_loaded, name)

    async def delete(self, name: str) -> None:
        """A finetuned model or a checkpoint."""
        row = self._find(name)
        if row is None:
            if name in self.names or name in self._given:
                raise ApiError(403, f"{name!r} is not a finetuned model of this server", "model")
            raise _missing(name)
        self._store.delete("models", name)
        await self._runner.call(self._unload_if_loaded, name)
        directory = self._store.directory / "adapters" / row["directory"]
        await asyncio.to_thread(shutil.rmtree, directory, True)

    def _unload_if_loaded(self, name: str) -> None:
        self._used.pop(name, None)
        for adapter in self._engine.adapters():
            if adapter.name == name:
                self._engine.unload_adapter(name)

    def list(self) -> list[dict[str, Any]]:
        objects = [self._object(name, self._created, self.names[0], None) for name in self.names]
        objects += [
            self._object(name, created, self.names[0], self.names[0]) for name, (_, created) in self._given.items()
        ]
        for row in self._store.select("SELECT * FROM models WHERE base = ? ORDER BY rowid", self._base):
            objects.append(self._object(row["name"], row["created_at"], self.names[0], self.names[0]))
        return objects

    def get(self, name: str) -> dict[str, Any]:
        for model in self.list():
            if model["id"] == name:
                return model
        raise _missing(name)

    def _object(self, name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "flexcore",
            "root": root,
            "parent": parent,
            "max_model_len": self._engine.model().max_model_len,
        }
