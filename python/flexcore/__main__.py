"""python -m flexcore: the command line; --cmake-dir and --include-dir say where C++ programs find the package."""

from __future__ import annotations

import sys
from pathlib import Path

_DIRECTORIES = {"--cmake-dir": "lib/cmake/flexcore", "--include-dir": "include"}


def main() -> int:
    if len(sys.argv) == 2 and sys.argv[1] in _DIRECTORIES:
        print(Path(__file__).parent / _DIRECTORIES[sys.argv[1]])
        return 0
    from flexcore.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
