"""Checks the tree against tests/rules/rules.py: prints every violation, exits 1 if there is one."""

import subprocess
import sys
from pathlib import Path

from rules import RULES, Tree

SKIPPED = {".git", ".venv", "build", "dist", "__pycache__"}


def read_tree(root: Path) -> Tree:
    """Tracked files; where there is no git (an unpacked source archive), every file."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"], cwd=root, capture_output=True, check=False
    )
    if listing.returncode == 0:
        names = [Path(name) for name in listing.stdout.decode().split("\0") if name]
        return Tree(root, sorted(path for path in names if (root / path).is_file()))
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    return Tree(root, sorted(path for path in files if not SKIPPED.intersection(path.parts)))


def violations(root: Path) -> list[str]:
    tree = read_tree(root)
    return [violation for rule in RULES for violation in rule(tree)]


if __name__ == "__main__":
    found = violations(Path(__file__).resolve().parents[2])
    print("\n".join(found) if found else f"{len(RULES)} rules hold")
    sys.exit(bool(found))
