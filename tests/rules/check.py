"""Checks the tree against tests/rules/rules.py: prints every violation, exits 1 if there is one."""

import subprocess
import sys
from pathlib import Path

from rules import RULES, Tree

SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
}


def listed_by_git(root: Path) -> list[Path]:
    """Files that git does not ignore; none where there is no git, as in an unpacked source archive."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(name) for name in listing.split("\0") if name and (root / name).is_file()]


def read_tree(root: Path) -> Tree:
    paths = listed_by_git(root)
    if not paths:
        files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        paths = [path for path in files if not SKIPPED.intersection(path.parts)]
    return Tree(root, sorted(paths))


def violations(root: Path) -> list[str]:
    tree = read_tree(root)
    return [violation for rule in RULES for violation in rule(tree)]


if __name__ == "__main__":
    found = violations(Path(__file__).resolve().parents[2])
    print("\n".join(found) if found else f"{len(RULES)} rules hold")
    sys.exit(bool(found))
