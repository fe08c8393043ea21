"""flexcore bench WHAT: one module a benchmark, in flexcore.bench"""

from __future__ import annotations

import argparse
import importlib
import pkgutil

from flexcore import bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name in _available():
        module = importlib.import_module(f"flexcore.bench.{name}")
        summary = (module.__doc__ or name).strip().splitlines()[0]
        kind = kinds.add_parser(name, help=summary, description=module.__doc__)
        kind.add_argument("--json", metavar="FILE", help="write the numbers; - is standard output")
        module.add_arguments(kind)


def run(args: argparse.Namespace) -> int:
    return int(importlib.import_module(f"flexcore.bench.{args.what}").run(args) or 0)


def _available() -> list[str]:
    """Benchmarks of this installation; modules that begin with an underscore help them."""
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
