"""Where a GPU's time goes, by the kernels' own clocks (CUPTI, through torch.profiler): ops beside torch, and steps.

python bench/gpu_profile.py ops --json FILE          LoRA linears at the shapes of Llama-3.1-8B, beside torch
python bench/gpu_profile.py steps MODEL --json FILE  decode, prefill, a finetuned sequence: kernels by what they take

An op's time is the sum over its kernels and copies: what the host adds between them is seen in a step's wall time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import flexcore as fc

HIDDEN, WIDE, KV = 4096, 14336, 1024  # Llama-3.1-8B
GROUPS = {
    "qkv": (HIDDEN, (HIDDEN, KV, KV)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate_up": (HIDDEN, (WIDE, WIDE)),
    "down": (WIDE, (HIDDEN,)),
}
PARTS = ["decode:1,128", "decode:16,1024", "decode:16,1024,4", "prefill:2048", "finetune:2048"]
FLUSH_BYTES = 256 << 20
CALLS = 5


def kernel_events(work: Callable[[], None], gaps: list[dict[str, Any]] | None = None) -> list[tuple[str, float]]:
    """(name, microseconds) of what the device did, in order; the longest times in which it did nothing."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found.sort(key=lambda e: e.time_range.start)
    end, last, idle = None, "", []
    for event in found:
        if end is not None and event.time_range.start - end > 20:
            idle.append({"us": event.time_range.start - end, "after": short(last), "before": short(event.name)})
        if end is None or event.time_range.end > end:
            end, last = event.time_range.end, event.name
    if gaps is not None:
        gaps += sorted(idle, key=lambda gap: -gap["us"])[:12]
    return [(e.name, float(e.time_range.end - e.time_range.start)) for e in found]


def short(name: str) -> str:
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(anonymous namespace\)::|flexcore::cuda::|at::native::", "", name)
    return name.partition("(")[0][:90] if not name.startswith("Mem") else name


class Ops:
    def __init__(self) -> None:
        self.flush = torch.ones(2, FLUSH_BYTES // 4, device="cuda")

    def microseconds(self, call: Callable[[], Any]) -> tuple[float, dict[str, float]]:
        """Median over calls with a cold cache, and the kernels' shares."""
        call()
        torch.cuda.synchronize()

        def work() -> None:
            for _ in range(CALLS):
                self.flush[1].copy_(self.flush[0])  # what nothing else here does
                call()

        calls: list[list[tuple[str, float]]] = []
        for name, took in kernel_events(work):
            if "DtoD" in name:
                calls.append([])
            elif calls:
                calls[-1].append((name, took))
        sums = [sum(took for _, took in events) for events in calls]
        by_name: dict[str, float] = defaultdict(float)
        for name, took in itertools.chain(*calls):
            by_name[short(name)] += took / len(calls)
        return statistics.median(sums), dict(sorted(by_name.items(), key=lambda item: -item[1]))


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def lora_cases(quick: bool) -> Iterator[tuple[str, int, int, int]]:
    tokens = (1, 16, 128, 512, 2048, 8192)
    for group in ("o",) if quick else GROUPS:
        for m in tokens:
            yield group, m, 16, 1
    for m in tokens:
        for adapters in (8, 64):
            if m >= adapters:
                yield "o", m, 16, adapters
        if not quick:
            for rank in (8, 64, 128):
                yield "o", m, rank, 1


def calls_of(m: int, k: int, n: int, rank: int, adapters: int) -> dict[str, Callable[[], Any]]:
    """One linear with a bypass, forth and back: flexcore's, torch's plain product, and torch with three products."""
    x, w, grad = random(m, k), random(n, k, scale=k**-0.5), random(m, n)
    a = random(adapters, rank, k, scale=k**-0.5, dtype=torch.float32)
    b = random(adapters, n, rank, dtype=torch.float32)
    bounds = torch.tensor([m * s // adapters for s in range(adapters + 1)], dtype=torch.int32)
    layout = (torch.full((adapters,), 2.0), bounds, torch.arange(adapters, dtype=torch.int32))
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: fc.ops.linear(x, w),
        "lora_linear": lambda: fc.ops.lora_forward(x, w, a, b, *layout),
        "torch_linear": lambda: torch.nn.functional.linear(x, w),
        "linear_backward": lambda: fc.ops.linear_backward(grad, w),
        "lora_linear_backward": lambda: fc.ops.lora_backward(grad, x, w, a, b, *layout),
        "torch_linear_backward": lambda: grad @ w,
    }
    if adapters > 1:
        return calls
    a16, b16 = a[0].bfloat16(), b[0].bfloat16()

    def torch_lora_backward() -> Any:
        down, grad_down = x @ a16.T, grad @ b16 * 2.0
        return grad @ w + grad_down @ a16, grad_down.T @ x, grad.T @ down * 2.0

    return calls | {
        "torch_lora": lambda: torch.nn.functional.linear(x, w) + 2.0 * ((x @ a16.T) @ b16.T),
        "torch_lora_backward": torch_lora_backward,
    }


def ops(args: argparse.Namespace) -> list[dict[str, Any]]:
    clock, rows = Ops(), []
    for group, m, rank, adapters in lora_cases(args.quick):
        k, widths = GROUPS[group]
        us: dict[str, float] = defaultdict(float)
        kernels: dict[str, dict[str, float]] = {}
        for n in widths:
            for name, call in calls_of(m, k, n, rank, adapters).items():
                took, shares = clock.microseconds(call)
                us[name] += took
                kernels.setdefault(name, {kernel: round(t, 2) for kernel, t in list(shares.items())[:8]})
        row = {
            "group": group,
            "tokens": m,
            "rank": rank,
            "adapters": adapters,
            "us": {name: round(took, 2) for name, took in us.items()},
            "forward_over_gemm": us["lora_linear"] / us["torch_linear"],
            "backward_over_gemm": us["lora_linear_backward"] / us["torch_linear_backward"],
            "kernels": kernels,
        }
        rows.append(row)
        print(
            f"{group:>7} M={m:<5} r={rank:<4} adapters={adapters:<3}"
            f" gemm {us['torch_linear']:8.1f} ours {us['linear']:8.1f} +lora {us['lora_linear']:8.1f}"
            f" ({row['forward_over_gemm']:.2f}x) torch lora {us['torch_lora']:8.1f} |"
            f" backward gemm {us['torch_linear_backward']:8.1f} ours {us['linear_backward']:8.1f}"
            f" +lora {us['lora_linear_backward']:8.1f} ({row['backward_over_gemm']:.2f}x)"
            f" torch {us['torch_lora_backward']:8.1f}",
            flush=True,
        )
    return rows


def peaks() -> dict[str, float]:
    """Bytes read and written by a copy, and the rate of a bfloat16 product, a second; on random numbers."""
    source = torch.randn(1 << 29, device="cuda")
    target, side = torch.empty_like(source), random(8192, 8192)

    def best(call: Callable[[], Any]) -> float:
        call()
        times = []
        for _ in range(8):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return min(times)

    return {
        "copy_bytes_per_s": 2.0 * source.nbytes / best(lambda: target.copy_(source)),
        "bfloat16_flops": 2.0 * 8192**3 / best(lambda: side @ side),
    }


class Steps:
    """An engine's steps: wall time without the profiler, then kernels with it."""

    def __init__(self, model: str) -> None:
        # Objectives that never bind: what a step holds follows from sizes.
        config = fc.EngineConfig(
            device="cuda",
            max_num_batched_tokens=2048,
            max_model_len=4608,
            max_num_seqs=64,
            enable_prefix_caching=False,
            slo=fc.SLO(tpot_ms=1e6, ttft_ms=1e6),
        )
        self.engine = fc.Engine(model, config)
        self.vocab = self.engine.model().vocab_size
        self.rows: list[dict[str, Any]] = []

    def ids(self, count: int, seed: int) -> list[int]:
        source = torch.Generator().manual_seed(seed)
        return torch.randint(10, self.vocab, (count,), generator=source).tolist()

    def adapter(self, name: str) -> str:
        if name not in [adapter.name for adapter in self.engine.adapters()]:
            self.engine.create_adapter(name, fc.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        return name

    def measure(self, name: str, tokens: float, once: Callable[[], None], repeats: int) -> None:
        """Of what `once` runs, which has been run before."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            once()
        torch.cuda.synchronize()
        wall = 1e6 * (time.perf_counter() - start) / repeats
        gaps: list[dict[str, Any]] = []
        events = kernel_events(lambda: [once() for _ in range(repeats)], gaps)
        by_name: dict[str, list[float]] = defaultdict(list)
        for kernel, took in events:
            by_name[short(kernel)].append(took)
        kernels = [
            {
                "name": kernel,
                "count": len(took) / repeats,
                "us": round(sum(took) / repeats, 1),
                "each_us": round(statistics.median(took), 2),
            }
            for kernel, took in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        ]
        busy = sum(took for _, took in events) / repeats
        row = {
            "step": name,
            "wall_us": round(wall, 1),
            "device_us": round(busy, 1),
            "tokens_per_s": round(1e6 * tokens / wall, 1),
            "launches": len(events) / repeats,
            "kernels": kernels[:32],
            "gaps": gaps,
            "memory_peak": self.engine.memory_peak(),
        }
        self.rows.append(row)
        print(
            f"\n{name}: wall {wall:,.0f} us, device {busy:,.0f} us, {row['launches']:.0f} launches, "
            f"{row['tokens_per_s']:,.0f} tok/s"
        )
        for k in kernels[:16]:
            print(f"  {k['us']:10.1f} us {k['count']:6.0f} x {k['each_us']:8.2f}  {k['name']}")
        for gap in gaps[:6]:
            print(f"  {gap['us']:10.1f} us idle between {gap['after']} and {gap['before']}")
        sys.stdout.flush()

    def step(self) -> None:
        self.engine.step()

    def drain(self, requests: Sequence[int] = ()) -> None:
        for request in requests:
            self.engine.cancel(request)
        for job in self.engine.jobs():
            if job.status in ("queued", "running", "paused"):
                self.engine.cancel_job(job.id)
        while self.engine.has_work():
            self.engine.step()

    def decode(self, batch: int, context: int, adapters: int = 0) -> None:
        params = fc.SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        names = [self.adapter(f"a{k}") for k in range(adapters)]
        of_prompt = [names[k % adapters] if names else None for k in range(batch)]
        requests = self.engine.submit_batch([self.ids(context, k) for k in range(batch)], params, of_prompt)
        waiting = set(requests)
        while waiting:
            waiting -= {event.request_id for event in self.engine.step().outputs}
        for _ in range(5):  # the step is recorded by then
            self.engine.step()
        name = f"decode batch {batch} context {context}" + (f" adapters {adapters}" if adapters else "")
        self.measure(name, batch, self.step, 16)
        self.drain(requests)

    def prefill(self, length: int) -> None:
        params = fc.SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        requests = self.engine.submit_batch([self.ids(length, k) for k in range(16)], params)
        for _ in range(2):
            self.engine.step()
        self.measure(f"prefill {length}", length, self.step, 4)
        self.drain(requests)

    def finetune(self, length: int) -> None:
        """An optimizer step on one sequence, a job alone."""
        examples = [fc.Example(ids := self.ids(length, k), ids) for k in range(16)]
        settings = fc.FinetuneConfig(batch_size=1, num_epochs=100)
        job = self.engine.finetune(self.adapter(f"t{length}"), examples, settings)

        def sequence() -> None:
            before = self.engine.job(job).step
            while self.engine.job(job).step == before:
                self.engine.step()

        for _ in range(2):
            sequence()
        self.measure(f"finetune sequence of {length}", length, sequence, 4)
        self.drain()


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    run = Steps(args.model)
    for part in args.parts:
        kind, _, numbers = part.partition(":")
        try:
            getattr(run, kind)(*map(int, numbers.split(",")))
        except fc.Error as error:
            print(f"{part}: {error}", flush=True)
            run.rows.append({"step": part, "error": str(error)})
    return run.rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    of_ops = verbs.add_parser("ops")
    of_ops.add_argument("--quick", action="store_true", help="one group, rank 16")
    of_steps = verbs.add_parser("steps")
    of_steps.add_argument("model")
    of_steps.add_argument(
        "--parts", nargs="+", default=PARTS, help="decode:BATCH,CONTEXT[,ADAPTERS], prefill:TOKENS, ..."
    )
    for verb in (of_ops, of_steps):
        verb.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "peaks": peaks()}
    torch.cuda.empty_cache()
    print(json.dumps(found))
    found[args.what] = ops(args) if args.what == "ops" else steps(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
