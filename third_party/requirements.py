"""Prints requirements from pyproject.toml, one a line, for `pip install -r`: build, run, or the name of an extra."""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def requirements(project: dict[str, Any], group: str) -> list[str]:
    if group == "build":  # pip brings cmake and ninja into isolated builds only
        return [*project["build-system"]["requires"], "cmake>=3.25", "ninja"]
    if group == "run":
        return list(project["project"]["dependencies"])
    return list(project["project"]["optional-dependencies"][group])


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for group in sys.argv[1:]:
        print("\n".join(requirements(project, group)))


if __name__ == "__main__":
    main()
