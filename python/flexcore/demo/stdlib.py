"""Training rows that are on every machine: Python's own functions, signature -> first line of the docstring."""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Code about code, generated code and copies are no good teachers.
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
_TASK = "Describe the Python function in one line."
_MAX_SIGNATURE, _MIN_ANSWER, _MAX_ANSWER = 160, 20, 120  # characters


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` chat rows, shuffled; the same for the same Python. Reads only as many sources as that takes."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if _SKIPPED.isdisjoint(path.relative_to(root).parts)]
    source = random.Random(seed)
    source.shuffle(paths)
    found: dict[tuple[str, str], None] = {}
    for path in paths:
        if len(found) >= count:
            break
        found.update(dict.fromkeys(_of_file(path)))
    pairs = list(found)
    source.shuffle(pairs)
    return [row(signature, answer) for signature, answer in pairs[:count]]


def row(signature: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": _TASK},
            {"role": "user", "content": signature},
            {"role": "assistant", "content": answer},
        ]
    }


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have odd escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    yield from _of_module(tree)


def _of_module(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            answer = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            sentence = answer[:1].isupper() and answer.endswith(".")
            if sentence and _MIN_ANSWER <= len(answer) <= _MAX_ANSWER and len(signature) <= _MAX_SIGNATURE:
                yield signature, answer
