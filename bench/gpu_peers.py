"""transformers and PEFT on one GPU: what `bench/gpu_profile.py steps` measures of flexcore, on the same model.

python bench/gpu_peers.py MODEL --json FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(device: str, call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Peers:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).to(args.device)
        self.weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in self.model.parameters()}.values())

    def ids(self, batch: int, length: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(length)
        ids = torch.randint(10, self.model.config.vocab_size, (batch, length), generator=source)
        return ids.to(self.args.device)

    def add(self, what: str, **numbers: Any) -> None:
        self.rows.append({"what": what, **numbers})
        print(what, {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}, flush=True)

    @torch.no_grad()
    def decode(self, batch: int, context: int, tokens: int) -> None:
        """Seconds of a token after the first: of generation with `tokens` more than with one."""
        prompts = self.ids(batch, context)

        def generate(count: int) -> None:
            self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
            )

        short, long = (seconds(self.args.device, lambda n=n: generate(n), 2) for n in (1, 1 + tokens))
        each = (long - short) / tokens
        self.add(f"decode batch {batch} context {context}", tpot_ms=1000 * each, tokens_per_s=batch / each)

    @torch.no_grad()
    def prefill(self, length: int) -> None:
        prompt = self.ids(1, length)
        took = seconds(self.args.device, lambda: self.model(prompt, use_cache=True, logits_to_keep=1), 4)
        self.add(f"prefill {length}", ms=1000 * took, tokens_per_s=length / took)

    def finetune(self, length: int, checkpointing: bool) -> None:
        """LoRA r16 on every linear, AdamW, one sequence a step; the adapter's parameters are float32, as by default."""
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(self.model, config).train()
        if checkpointing:
            tuned.enable_input_require_grads()
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
        row = self.ids(1, length)
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            with torch.autocast(self.args.device, dtype=torch.bfloat16):
                tuned(input_ids=row, labels=row).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        name = f"finetune {length}" + (", gradient checkpointing" if checkpointing else "")
        try:
            took = seconds(self.args.device, step, 3)
            peak = torch.cuda.max_memory_allocated() - self.weights if self.args.device == "cuda" else 0
            self.add(name, ms=1000 * took, tokens_per_s=length / took, peak_above_weights_bytes=peak)
        except torch.OutOfMemoryError:
            self.add(name, error="out of memory")
        if checkpointing:
            tuned.gradient_checkpointing_disable()
        self.model = tuned.unload().eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--length", type=int, default=2048, metavar="TOKENS", help="of a prefill and of half a sequence"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    peers = Peers(args)
    for batch, context in ((1, 128), (16, args.length // 2), (64, args.length // 2)):
        peers.decode(batch, context, 16)
    peers.prefill(args.length)
    for checkpointing in (False, True):
        peers.finetune(2 * args.length, checkpointing)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "peers": peers.rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
