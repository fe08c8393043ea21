"""Registers, spills and static shared memory of every CUDA kernel, as ptxas reports them: a table for the repository.

python bench/kernel_resources.py > csrc/backends/cuda/RESOURCES.md
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "backends" / "cuda"
ARCHITECTURES = ("80", "90a")

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Usage:
    """What one kernel takes on one architecture."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0

    def __str__(self) -> str:
        extra = [f"stack {self.stack}"] * (self.stack > 0) + [f"spills {self.spills}"] * (self.spills > 0)
        extra += [f"static shared {self.shared}"] * (self.shared > 0)
        return f"{self.registers}" + (f" ({', '.join(extra)})" if extra else "")


def ptxas_report(source: Path) -> str:
    """What ptxas says of a file's kernels; raises with its text when it does not compile."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = ["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", *targets, "-Xptxas", "-v"]
    run = subprocess.run([*command, "-c", str(source), "-o", "/dev/null"], capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{source}: nvcc failed\n{run.stderr}")
    return run.stderr


def parse(report: str) -> dict[str, dict[str, Usage]]:
    """Mangled kernel name -> architecture -> usage."""
    found: dict[str, dict[str, Usage]] = {}
    usage = Usage()
    for line in report.splitlines():
        if entry := ENTRY.search(line):
            usage = found.setdefault(entry[1], {}).setdefault(entry[2], Usage())
        elif frame := FRAME.search(line):
            usage.stack, usage.spills = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := USED.search(line):
            usage.registers = int(used[1])
            shared = SHARED.search(line)
            usage.shared = int(shared[1]) if shared else 0
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Mangled -> demangled, without namespaces and parameter lists."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    result = {}
    for mangled, name in zip(names, run.stdout.splitlines(), strict=True):
        name = name.removeprefix("void ").replace("flexcore::cuda::", "").replace("(anonymous namespace)::", "")
        depth, end = 0, len(name)
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        result[mangled] = name[:end].replace("(int)", "").replace("(bool)1", "true").replace("(bool)0", "false")
    return result


def main() -> int:
    """Prints the table; exit status 1 when a kernel spills or has a stack frame."""
    print("# Registers and shared memory of every kernel\n")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    print(f"Written by `bench/kernel_resources.py` with nvcc {release[1] if release else '?'}: registers a thread, and")
    print("what is not zero of stack, spill and static shared bytes. Dynamic shared memory is chosen at the launch.\n")
    bad = 0
    for source in sorted(SOURCES.glob("*.cu")):
        kernels = parse(ptxas_report(source))
        if not kernels:
            continue
        names = readable(sorted(kernels))
        print(f"## {source.name}\n\n| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
        print("|---|" + "---|" * len(ARCHITECTURES))
        for mangled in sorted(kernels, key=lambda k: names[k]):
            usage = kernels[mangled]
            print(f"| `{names[mangled]}` | " + " | ".join(str(usage.get(a, "-")) for a in ARCHITECTURES) + " |")
            bad += sum(u.spills > 0 or u.stack > 0 for u in usage.values())
        print()
    if bad:
        print(f"{bad} kernels spill or have a stack frame", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
