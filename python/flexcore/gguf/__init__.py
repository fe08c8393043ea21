"""GGUF files (llama.cpp) as Hugging Face directories, so that one loader serves both."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexcore._core import Error, InvalidArgument, ModelLoadError
from flexcore.gguf.config import generation_config, model_config
from flexcore.gguf.metadata import Metadata
from flexcore.gguf.tokenizer import build_tokenizer, tokenizer_config
from flexcore.gguf.weights import DTYPES, write_weights

__all__ = ["Metadata", "convert"]

# Raised whenever a converted directory changes, so that cached ones are made again.
FORMAT = 1


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str = "bfloat16",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `source` (.gguf; llama, mistral, qwen2, qwen3) to the directory `target` and returns it.

    config.json, model.safetensors in `dtype` ("bfloat16", "float16", "float32"), tokenizer.json, tokenizer_config.json
    with the chat template, generation_config.json. Tensors pass one by one; the directory appears whole or not at all.
    `progress(done, total)` counts bytes written. Raises ModelLoadError, Unsupported, InvalidArgument.
    """
    source, target = Path(source), Path(target)
    if dtype not in DTYPES:
        raise InvalidArgument(f"convert: dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgument(f"convert: target: {target} exists and is not an empty directory")
    try:
        metadata = Metadata(source)
        config = model_config(metadata, dtype)
        generation, tokenizer = generation_config(metadata), build_tokenizer(metadata)
        of_tokenizer = tokenizer_config(metadata)
    except Error:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{source}: its metadata cannot be read: {type(error).__name__}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation)
        tokenizer.save(str(partial / "tokenizer.json"))
        _write_json(partial / "tokenizer_config.json", of_tokenizer)
        write_weights(metadata, partial / "model.safetensors", dtype, progress)
        partial.chmod(0o755)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
