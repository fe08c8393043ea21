"""Registers, stack, spills and shared memory of every CUDA kernel, for each architecture: a table for the repository.

Compiles every launcher with nvcc, which takes minutes, so it is run by hand when kernels change:

    python bench/kernel_resources.py > csrc/backends/cuda/RESOURCES.md

The exit status is 1 when a kernel has a stack frame or spills that EXPLANATIONS does not explain.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "backends" / "cuda"
ARCHITECTURES = ("80", "90a")

# Kernel -> why it may have a stack frame or spills.
EXPLANATIONS: dict[str, str] = {}

# Kernel, and what its launcher asks for in bytes; {0} is its first template argument. A text where the call decides.
SHARED = {
    "attention_forward_kernel": "ForwardShape<{0}>::kSharedBytes",
    "attention_grad_kv_kernel": "GradKvShape<{0}>::kSharedBytes",
    "attention_grad_q_kernel": "GradQShape<{0}>::kSharedBytes",
    "exact_attention_forward_kernel": "ExactForwardShape<{0}>::kSharedBytes",
    "exact_attention_grad_kv_kernel": "ExactBackwardShape<{0}>::kSharedBytes",
    "exact_attention_grad_q_kernel": "ExactBackwardShape<{0}>::kSharedBytes",
    "chunk_max_kernel": "2 * kWarpSize * sizeof(float)",
    "absorb_chunk_kernel": "2 * kWarpSize * sizeof(float)",
    "row_cross_entropy_kernel": "2 * kWarpSize * sizeof(float)",
    "rms_norm_kernel": "2 * kWarpSize * sizeof(float)",
    "rms_norm_backward_kernel": "2 * kWarpSize * sizeof(float)",
    "lora_shrink_kernel": "kShrinkBytes<{2}>",
    "exact_lora_shrink_kernel": "kLoraN * sizeof(LoraColumn) + LoraPipeline<LoraMode::kExact, false, {0}>::kBytes",
    "lora_gradient_kernel": "kLoraN * sizeof(LoraColumn) + LoraPipeline<LoraMode({0}), true, true>::kBytes",
    "lora_expand_kernel": "by rows and ranks",
    "exact_lora_expand_kernel": "by rows and ranks",
    "peak_kernel": "kWarpSize * (sizeof(RowPeak) + sizeof(double))",
    "draw_kernel": "sizeof(SelectShared)",
    "top_logprobs_kernel": "sizeof(SelectShared)",
    "sum_squares_kernel": "kWarpSize * sizeof(double)",
    "add_up_kernel": "kWarpSize * sizeof(double)",
    "quantize_kernel": "kLevelBytes",
    "dequantize_kernel": "kLevelBytes",
    "quantized_rows_kernel": "kLevelBytes",
    "scale_gradient_kernel": "kScaleGradientRows * kWarpSize * sizeof(float)",
    "dora_norm_kernel": "by ranks",
}

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")
KERNEL = re.compile(r"__global__\b(?:(?!\{).)*?\b(\w+_kernel)\(.*?(?=__global__|\Z)", re.DOTALL)


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
    command = ["nvcc", "-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", *targets]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [*command, "-Xptxas", "-v", "-c", str(source), "-o", f"{folder}/kernels.o"], capture_output=True, text=True
        )
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
            shared = STATIC.search(line)
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
            if c == "(" and depth == 0 and not name[i:].startswith("(int)"):
                end = i
                break
        name = re.sub(r"\((int|LoraMode|Codes)\)", "", name[:end])
        result[mangled] = name.replace("(bool)1", "true").replace("(bool)0", "false")
    return result


def arguments(name: str) -> list[str]:
    """Template arguments of a readable name, those of the outermost level."""
    inside = name.partition("<")[2].rpartition(">")[0]
    parts, depth = [""], 0
    for c in inside:
        depth += (c == "<") - (c == ">")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def dynamic_shared(names: list[str]) -> dict[str, str]:
    """Kernel -> bytes of dynamic shared memory, computed by the host's compiler from the kernels' own headers."""
    headers = sorted((SOURCES / "kernels").glob("*.cuh"))
    users = {
        kernel[1]
        for header in headers
        for kernel in KERNEL.finditer(header.read_text())
        if "FLEXCORE_SHARED(" in kernel[0]
    }
    if users != set(SHARED):
        raise SystemExit(f"SHARED names {sorted(set(SHARED) - users)} too many and lacks {sorted(users - set(SHARED))}")
    formulas = {}
    for name in names:
        formula = SHARED.get(name.partition("<")[0])
        if formula:
            formulas[name] = formula.format(*arguments(name))
    constants = [name for name, formula in formulas.items() if not formula.startswith("by ")]
    prints = "".join(f'  std::printf("%d\\n", static_cast<int>({formulas[name]}));\n' for name in constants)
    includes = "".join(f'#include "backends/cuda/kernels/{header.name}"\n' for header in headers)
    program = f"#include <cstdio>\n{includes}using namespace flexcore::cuda;\nint main() {{\n{prints}}}\n"
    simt = ROOT / "tests" / "simt"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.cpp").write_text(program)
        flags = ["-std=c++20", "-DFLEXCORE_SIMT"]
        sources = [f"{folder}/sizes.cpp", simt / "simt.cpp", simt / "cuda_runtime.cpp"]
        paths = [f"-I{path}" for path in (simt / "include", simt, ROOT / "csrc", ROOT / "csrc" / "include")]
        subprocess.run(["c++", *flags, *paths, *sources, "-o", f"{folder}/sizes"], check=True)
        sizes = subprocess.run([f"{folder}/sizes"], capture_output=True, text=True, check=True).stdout.split()
    return formulas | dict(zip(constants, sizes, strict=True))


def main() -> int:
    """Prints the table; exit status 1 when a kernel spills or has a stack frame and nothing explains it."""
    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        files = dict(zip(sources, map(parse, pool.map(ptxas_report, sources)), strict=True))
    names = readable(sorted({mangled for kernels in files.values() for mangled in kernels}))
    shared = dynamic_shared(sorted(set(names.values())))

    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V([\d.]+)", version)
    print("# Registers and shared memory of every kernel\n")
    print(f"Written by `bench/kernel_resources.py` with nvcc {release[1] if release else '?'} when kernels change.")
    print("Registers are of a thread; stack, spills and static shared memory are bytes, named where they are not zero.")
    print("Dynamic shared memory is bytes of one block.\n")
    unexplained = []
    for source, kernels in files.items():
        if not kernels:
            continue
        titles = [f"sm_{a}" for a in ARCHITECTURES]
        print(f"## {source.name}\n\n| kernel | {' | '.join(titles)} | dynamic shared |")
        print("|---|" + "---|" * (len(ARCHITECTURES) + 1))
        for mangled in sorted(kernels, key=lambda k: names[k]):
            name, usage = names[mangled], kernels[mangled]
            cells = [str(usage.get(a, "-")) for a in ARCHITECTURES]
            print(f"| `{name}` | {' | '.join(cells)} | {shared.get(name, '0')} |")
            if any(u.spills > 0 or u.stack > 0 for u in usage.values()) and name not in EXPLANATIONS:
                unexplained.append(name)
        print()
    for name, why in EXPLANATIONS.items():
        print(f"`{name}`: {why}\n")
    if unexplained:
        print(f"stack frames or spills that nobody explains: {', '.join(unexplained)}", file=sys.stderr)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
