"""Where verbs print: results to standard output, progress to standard error and only if that is a terminal.

What a model says goes through print(): a rich console would wrap it and change its tabs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from flexcore import EngineConfig
    from flexcore.llm import LLM

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


@contextmanager
def bytes_progress(description: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback progress(done, total) that draws a bar, or None where nobody watches."""
    if not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(description, total=None, visible=False)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield update


def load_llm(
    model: str,
    config: EngineConfig,
    adapters: list[tuple[str, str]] | None = None,
    chat_template: str | None = None,
) -> LLM:
    """An LLM with its adapters, with signs of life while it loads."""
    from flexcore.llm import LLM
    from flexcore.models import resolve_model

    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    with bytes_progress("converting") as progress:
        directory = resolve_model(model, progress)
    if err.is_terminal:
        with err.status(escape(f"loading {Path(model).name}")):
            llm = LLM(directory, config, chat_template=template)
    else:
        llm = LLM(directory, config, chat_template=template)
    for name, adapter in adapters or []:
        llm.engine.load_adapter(name, adapter)
    return llm


def write_json(path: str | None, value: Any) -> None:
    if path == "-":
        print(json.dumps(value, indent=2))
    elif path:
        Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
