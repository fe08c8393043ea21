"""Rows of .jsonl and .json files, also gzipped, each with the place that an error should name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from flexcore._core import InvalidArgument


@dataclass
class Row:
    """One row and where it stands: "train.jsonl:17"."""

    where: str
    value: Mapping[str, Any]

    def fail(self, field: str, problem: str) -> NoReturn:
        raise InvalidArgument(f"{self.where}: {field}: {problem}")


def read_rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        path = _of_folder(path)
    if not path.is_file():
        raise InvalidArgument(f"{path}: no such file")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".json", ".ndjson"):
        raise InvalidArgument(f"{path}: wanted a .jsonl or .json file, or one of them as .gz")
    try:
        with _open(path) as file:
            yield from _array(path, file) if suffix == ".json" else _lines(path, file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from error


def _of_folder(path: Path) -> Path:
    for name in ("train.jsonl", "train.json", "train.jsonl.gz", "train.json.gz"):
        if (path / name).is_file():
            return path / name
    raise InvalidArgument(f"{path}: a folder without train.jsonl")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(path: Path, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _row(f"{path}:{number}", _parse(f"{path}:{number}", line))


def _array(path: Path, file: IO[str]) -> Iterator[Row]:
    text = file.read()
    try:
        values = json.loads(text)
    except ValueError:
        # Many .json data sets are JSON lines.
        first, _, rest = text.lstrip().partition("\n")
        if not (first.startswith("{") and first.rstrip().endswith("}") and rest.strip()):
            _parse(str(path), text)
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _row(f"{path}:{number}", _parse(f"{path}:{number}", line))
        return
    if not isinstance(values, list):
        values = [values]
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}: row {number}", value)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise InvalidArgument(f"{where}: not JSON: {error.msg} at {position}") from None


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: got {type(value).__name__}, wanted an object with fields")
    return Row(where, value)
