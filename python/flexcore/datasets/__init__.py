"""Training data: chat, prompt/completion, Alpaca, ShareGPT, plain text and token rows, as Examples.

    dataset = fc.datasets.load("train.jsonl", tokenizer, max_length=1024)
    dataset.examples, dataset.form, dataset.summary()

Loss is on what the assistant (or the completion) says, its end-of-turn token included. Errors name file:line and field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexcore._core import Example, InvalidArgument
from flexcore.datasets.encode import Encoder
from flexcore.datasets.forms import FORMS, detect, parse
from flexcore.datasets.reader import Row, read_rows
from flexcore.tokenizer import Tokenizer

__all__ = ["FORMS", "Dataset", "load"]


@dataclass
class Dataset:
    """Tokenised examples, and what became of the rows."""

    form: str
    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0  # examples cut at max_length
    dropped: int = 0  # rows without a target token
    split: int = 0  # conversations whose template forced one example a turn
    target_tokens: int = 0
    tokens: int = 0

    def summary(self) -> str:
        parts = [f"{self.rows} rows ({self.form}), {len(self.examples)} examples, {self.tokens} tokens"]
        parts.append(f"{self.target_tokens} with loss")
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped (nothing to learn from)")
        if self.split:
            parts.append(f"{self.split} conversations split by turn")
        return ", ".join(parts)


def load(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_length: int | None = None,
    form: str | None = None,
) -> Dataset:
    """Reads a .jsonl or .json file (also .gz), a folder with train.jsonl, or rows.

    `form` (one of FORMS) is found from the first row if not given; one source has one form. Examples longer than
    `max_length` tokens are cut there and counted. Raises InvalidArgument.
    """
    if max_length is not None and max_length < 2:
        raise InvalidArgument(f"datasets.load: max_length: got {max_length}, wanted at least 2")
    if form is not None and form not in FORMS:
        raise InvalidArgument(f"datasets.load: form: got {form!r}, wanted one of {', '.join(FORMS)}")
    dataset: Dataset | None = None
    encoder = Encoder(tokenizer, max_length)
    for row in _rows(source):
        if dataset is None:
            dataset = Dataset(form or detect(row))
        _add(dataset, encoder, row)
    if dataset is None:
        raise InvalidArgument(f"datasets.load: {source if isinstance(source, str | Path) else 'rows'}: no rows")
    if not dataset.examples:
        raise InvalidArgument(f"datasets.load: none of {dataset.rows} rows has a token to learn from")
    return dataset


def _rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Row]:
    if isinstance(source, str | Path):
        yield from read_rows(Path(source))
        return
    for index, value in enumerate(source):
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"rows[{index}]: got {type(value).__name__}, wanted a dict")
        yield Row(f"rows[{index}]", value)


def _add(dataset: Dataset, encoder: Encoder, row: Row) -> None:
    encoded = encoder.encode(parse(dataset.form, row), row)
    dataset.rows += 1
    dataset.truncated += encoded.truncated
    dataset.dropped += not encoded.examples
    dataset.split += len(encoded.examples) > 1
    for ids, labels in encoded.examples:
        dataset.examples.append(Example(ids, labels))
        dataset.tokens += len(ids)
        dataset.target_tokens += sum(label != -100 for label in labels[1:])  # the first token is nobody's target
