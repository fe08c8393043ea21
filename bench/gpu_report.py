"""What bench/gpu.sh found, as one JSON file and a short table: machine, stages, tests, sanitizers, benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGES = ("torch", "transformers", "peft", "numpy", "pybind11", "nanobind", "scikit-build-core", "cmake", "pytest")
LOG_BYTES = 200_000  # of each stage, its end


def said(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(nvcc: str, travel: Path) -> dict[str, Any]:
    """The commit is git's, or what --pack wrote down where the tree came without its history."""
    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
    name, driver, memory, capability = [part.strip() for part in gpu.splitlines()[0].split(",")] if gpu else [None] * 4
    release = re.search(r"release ([\d.]+)", said(nvcc, "--version")) if nvcc else None
    packed = travel / "commit"
    commit = said("git", "rev-parse", "HEAD") + (" with changes" if said("git", "status", "--porcelain") else "")
    if not said("git", "rev-parse", "HEAD"):
        commit = f"{packed.read_text().strip()} when packed" if packed.exists() else "unknown"
    return {
        "gpu": name,
        "driver": driver,
        "memory": memory,
        "compute_capability": capability,
        "cuda": release[1] if release else None,
        "commit": commit,
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
    }


def missing_wheels(travel: Path) -> list[Path]:
    """Wheels of packages that this interpreter does not have."""
    return [wheel for wheel in sorted(travel.glob("wheels/*.whl")) if version(wheel.name.split("-")[0]) is None]


def cpp_tests(results: Path) -> dict[str, Any]:
    """A shard without a file ended early: its tests are not in the counts."""
    shards = [json.loads(file.read_text()) for file in sorted(results.glob("cpp*.json"))]
    failed = [
        f"{suite['name']}.{case['name']}"
        for shard in shards
        for suite in shard["testsuites"]
        for case in suite["testsuite"]
        if case.get("failures")
    ]
    return {"shards": len(shards), "tests": sum(shard["tests"] for shard in shards), "failed": failed}


def python_tests(results: Path) -> dict[str, Any]:
    file = results / "python.xml"
    if not file.exists():
        return {}
    cases = list(ElementTree.parse(file).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return {"tests": len(cases), "skipped": sum(c.find("skipped") is not None for c in cases), "failed": failed}


def sanitizer(results: Path, tool: str) -> dict[str, str]:
    """Outcome by family of tests."""
    file = results / f"{tool}.tsv"
    meaning = {"0": "ok", "99": "errors", "124": "out of time", "137": "out of time"}
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: meaning.get(code, f"exit status {code}") for name, code in (line.split("\t") for line in lines)}


def benchmarks(results: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(results.glob("*.json")):
        if not file.stem.startswith("cpp") and file.stem != "machine":
            found[file.stem] = json.loads(file.read_text())
    return found


def report(results: Path) -> dict[str, Any]:
    stages = []
    for line in (results / "stages.tsv").read_text().splitlines():
        name, outcome, status, seconds = line.split("\t")
        code = int(status) if status else None
        stages.append({"stage": name, "outcome": outcome, "exit_status": code, "seconds": int(seconds)})
    file = results / "machine.json"
    return {
        "machine": json.loads(file.read_text()) if file.exists() else {},
        "stages": stages,
        "cpp_tests": cpp_tests(results),
        "python_tests": python_tests(results),
        "sanitizers": {tool: sanitizer(results, tool) for tool in ("memcheck", "racecheck")},
        "benchmarks": benchmarks(results),
    }


def show(found: dict[str, Any]) -> None:
    print("\n" + " | ".join(str(found["machine"].get(key)) for key in ("gpu", "driver", "cuda", "commit")))
    for stage in found["stages"]:
        print(f"{stage['stage']:<11} {stage['outcome']:<12} {stage['seconds']:>4} s")
    for kind in ("cpp_tests", "python_tests"):
        tests = found[kind]
        failed = tests.get("failed", [])
        print(f"{kind}: {tests.get('tests', 0)}, {len(failed)} failed")
        for name in failed[:20]:
            print(f"  {name}")
    for tool, families in found["sanitizers"].items():
        outcomes = sorted(set(families.values()))
        print(f"{tool}: " + ", ".join(f"{list(families.values()).count(o)} {o}" for o in outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", type=Path, metavar="FILE", help="write down what this machine is")
    parser.add_argument("--missing-wheels", action="store_true", help="print those of the travel folder to install")
    parser.add_argument("--nvcc", default="")
    parser.add_argument("--travel", type=Path, default=Path("build/travel"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.missing_wheels:
        print("\n".join(map(str, missing_wheels(args.travel))))
    elif args.machine:
        args.machine.write_text(json.dumps(machine(args.nvcc, args.travel), indent=1) + "\n")
    else:
        found = report(args.results)
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        with (args.out / "gpu.log").open("wb") as log:
            for stage in found["stages"]:
                file = args.logs / f"{stage['stage']}.log"
                log.write(
                    f"== {stage['stage']}\n".encode() + (file.read_bytes()[-LOG_BYTES:] if file.exists() else b"")
                )
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
