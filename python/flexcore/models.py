"""What a `model` argument may be: a Hugging Face directory, a .gguf file, or a name on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexcore._core import InvalidArgument, ModelLoadError

ModelPath = str | os.PathLike[str]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def cache_directory() -> Path:
    """Where converted models are kept: $FLEXCORE_CACHE, or ~/.cache/flexcore."""
    chosen = os.environ.get("FLEXCORE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexcore"


def resolve_model(model: ModelPath, progress: Callable[[int, int], None] | None = None) -> Path:
    """The directory to load. A .gguf file is converted once; a hub name (owner/name[@revision]) is downloaded once."""
    if not isinstance(model, str | os.PathLike):
        raise InvalidArgument(f"model: got {model!r} ({type(model).__name__}), wanted a path or a hub name")
    try:
        path = Path(model).expanduser()
        is_gguf = path.is_file() and (path.suffix == ".gguf" or _is_gguf(path))
    except (OSError, RuntimeError, ValueError) as error:  # too long, of no user, with a null character, not readable
        raise ModelLoadError(f"model: {str(model)[:200]!r}: {error}") from error
    if is_gguf:
        return _converted(path, progress)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(files) == 1:
            return _converted(files[0], progress)
        return path
    if path.exists():
        raise ModelLoadError(f"model: {path} is neither a directory nor a .gguf file")
    if path.suffix != ".gguf" and _HUB_NAME.fullmatch(str(model)):
        return _downloaded(str(model))
    raise ModelLoadError(f"model: {path} does not exist (wanted a Hugging Face directory, a .gguf file or owner/name)")


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _converted(path: Path, progress: Callable[[int, int], None] | None) -> Path:
    from flexcore import gguf

    path = path.resolve()
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{gguf.FORMAT}"
    target = cache_directory() / "gguf" / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not (target / "config.json").exists():
        shutil.rmtree(target, ignore_errors=True)
        try:
            gguf.convert(path, target, progress=progress)
        except (OSError, InvalidArgument) as error:
            # Another process may have been faster; a full disk is not that.
            if not (target / "config.json").exists():
                raise ModelLoadError(f"model: {path} could not be converted into {target}: {error}") from error
    return target


def _downloaded(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelLoadError(
            f"model: {name!r} is no path on this machine, and to fetch it from the hub huggingface_hub is missing: "
            "pip install 'flexcore[hub]'"
        ) from error
    hub: Any = huggingface_hub
    options = {"revision": revision or None, "allow_patterns": _HUB_FILES}
    try:
        return Path(hub.snapshot_download(repository, **options))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"model: {name!r} is no path on this machine, and the hub did not give it: {reason}"
        ) from error
