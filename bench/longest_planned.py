"""The longest sequence that a budget of memory finetunes, planned: python bench/longest_planned.py

Of Llama-3.1-8B's and Llama-3.2-1B's shapes, LoRA r=32 at every linear, one sequence at a time, everything counted that
an engine takes (weights, pool, adapter, optimizer, workspace). On a GPU with all on the device, and with what host
memory it can use; needs a build with the CUDA backend, but no GPU. On the CPU, where the two are one memory, without.
Beside what Unsloth publishes for the 8B model in 4 bits (docs.unsloth.ai/basics/unsloth-benchmarks, by reading).
Writes bench/results/longest_planned.json.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import random_model
from compare import commit

import flexcore
from flexcore.bench._shapes import PRESETS

RESULT = Path(__file__).resolve().parent / "results" / "longest_planned.json"
LIMITS_GB = {"llama-3.2-1b": ("cpu", 4, 8), "llama-3.1-8b": ("cuda", 24, 80)}
HOST_BYTES = {"cpu": (0,), "cuda": (0, 1 << 40)}
POSITIONS = 1 << 20
PUBLISHED = {
    "source": "https://docs.unsloth.ai/basics/unsloth-benchmarks",
    "setting": "Llama 3.1 8B, QLoRA r=32 at all linears, batch 1",
    "Unsloth": {"24": 78475, "80": 342733},
    "Hugging Face + FA2": {"24": 5789, "80": 28454},
}


def longest(directory: str, limit: int, **options: Any) -> flexcore.MemoryPlan | None:
    """Its plan; None: not even weights fit. As max_model_len sizes some of the workspace, found by going round."""
    lora = flexcore.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    length = POSITIONS
    for _ in range(8):
        fields = {"max_num_seqs": 1, "max_model_len": length, **options}
        ample = flexcore.EngineConfig(**fields, kv_cache_memory_bytes=1 << 42)
        plan = flexcore.plan(directory, ample, lora, 16)
        pool = plan.kv_pages + plan.saved_activations + plan.gradients - plan.optimizer // 2
        left = limit - (plan.total - pool)
        if left <= 0:
            return None
        config = flexcore.EngineConfig(**fields, kv_cache_memory_bytes=left)
        found = flexcore.plan(directory, config, lora, 16).max_sequence_length
        if found >= length - 16:
            break
        length = found
    return flexcore.plan(directory, config, lora, min(found, length))


def main() -> None:
    rows = []
    for name, (device, *limits) in LIMITS_GB.items():
        with tempfile.TemporaryDirectory() as directory:
            config = random_model.config(PRESETS[name]) | {"max_position_embeddings": POSITIONS}
            (Path(directory) / "config.json").write_text(json.dumps(config))
            for gigabytes in limits:
                for weights in ("none", "nf4"):
                    for activations, host in itertools.product(("exact", "int8"), HOST_BYTES[device]):
                        options = {"quantization": weights, "finetune_activations": activations, "device": device}
                        plan = longest(directory, int(gigabytes * 1e9), **options, swap_space_bytes=host)
                        tokens = 0 if plan is None else plan.sequence_length
                        offloaded = 0 if plan is None else plan.offloaded_activations
                        row = {"model": name, "gigabytes": gigabytes, **options, "tokens": tokens}
                        rows.append(row | {"host_bytes": offloaded})
                        print(
                            f"{name} in {gigabytes} GB, weights {weights}, activations {activations},"
                            f" host {offloaded / 1e9:.1f} GB: {tokens:,} tokens"
                        )
    RESULT.write_text(json.dumps({"commit": commit(), "planned": rows, "published": PUBLISHED}, indent=1) + "\n")


if __name__ == "__main__":
    main()
