"""Reads a data set in a process of its own: Python's time and memory for it are not the server's, and it may be killed.

Standard input: the arguments of `load` as JSON. Standard output: an .npz of `lengths`, `input_ids`, `labels` and the
summary; or, on standard error and with exit status 3, what is wrong with the data.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flexcore import datasets
from flexcore._core import Error, Example, InvalidArgument
from flexcore.tokenizer import Tokenizer

_BAD_DATA = 3


async def read(
    path: Path, tokenizer: Tokenizer, longest: int, vocab_size: int, max_bytes: int
) -> tuple[list[Example], str]:
    """Examples and the data set's summary. Raises InvalidArgument that names the line, and Error when the process was
    killed. A caller that is cancelled takes it along."""
    template = tokenizer.chat_template
    arguments = {
        "path": str(path),
        "model": str(tokenizer.directory),
        "chat_template": template.source if template is not None else None,
        "longest": longest,
        "vocab_size": vocab_size,
        "max_bytes": max_bytes,
    }
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexcore.server.reading"), stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        output, errors = await process.communicate(json.dumps(arguments).encode())
    except asyncio.CancelledError:
        process.kill()
        raise
    if process.returncode == _BAD_DATA:
        raise InvalidArgument(errors.decode(errors="replace"))
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        why = last[0] if last else f"exit status {process.returncode}; is it too large for the memory?"
        raise Error(f"the data set could not be read: {why}")
    return await asyncio.to_thread(_examples, output)


def _examples(output: bytes) -> tuple[list[Example], str]:
    with np.load(io.BytesIO(output)) as arrays:
        ends = np.cumsum(arrays["lengths"])[:-1]
        ids, labels = np.split(arrays["input_ids"], ends), np.split(arrays["labels"], ends)
        examples = [Example(a.tolist(), b.tolist()) for a, b in zip(ids, labels, strict=True)]
        return examples, str(arrays["summary"])


def load(
    path: str, model: str, chat_template: str | None, longest: int, vocab_size: int, max_bytes: int
) -> dict[str, Any]:
    _limit_memory(max_bytes)
    dataset = datasets.load(path, Tokenizer(model, chat_template), longest)
    ids = np.concatenate([np.asarray(example.input_ids, np.int32) for example in dataset.examples])
    labels = np.concatenate([np.asarray(example.labels, np.int32) for example in dataset.examples])
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InvalidArgument(f"input_ids: token {ids.max()}, wanted 0 to {vocab_size - 1}")
    lengths = np.asarray([len(example.input_ids) for example in dataset.examples])
    return {"lengths": lengths, "input_ids": ids, "labels": labels, "summary": np.asarray(dataset.summary())}


def _limit_memory(max_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, hard))


def main() -> int:
    os.nice(5)
    try:
        arrays = load(**json.load(sys.stdin))
    except (InvalidArgument, MemoryError) as error:
        text = str(error) if isinstance(error, InvalidArgument) else "it needs more memory than a data set may have"
        sys.stderr.write(text)
        return _BAD_DATA
    np.savez(sys.stdout.buffer, **arrays)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
