"""transformers + PEFT finetuning for ever; a JSON line a step: {"tokens": trained, "seconds": since the start}."""

from __future__ import annotations

import itertools
import json
import time

import common
import torch
from transformers import AutoModelForCausalLM
from transformers_peft import finetuning, set_up


def main() -> None:
    args = common.arguments(__doc__)
    load = common.workload(args)
    set_up(args)
    _, step = finetuning(AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)), load)
    begin = time.perf_counter()
    for done in itertools.count(1):
        step(load.train, done)
        print(json.dumps({"tokens": done * load.train, "seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
