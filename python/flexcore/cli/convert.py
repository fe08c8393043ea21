"""flexcore convert SOURCE.gguf TARGET"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexcore.cli.console import bytes_progress, out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a .gguf file")
    parser.add_argument("target", help="directory to make")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])


def run(args: argparse.Namespace) -> int:
    from flexcore import gguf
    from flexcore.ui import format_bytes

    with bytes_progress("converting") as progress:
        target = gguf.convert(args.source, args.target, args.dtype, progress)
    for path in sorted(target.iterdir()):
        text = f"{format_bytes(path.stat().st_size):>12}  {Path(args.target) / path.name}"
        out.print(text, markup=False, soft_wrap=True)
    return 0
