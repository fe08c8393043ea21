"""transformers for inference, PEFT and torch.optim.AdamW for finetuning."""

from __future__ import annotations

import time

import common
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Called after every token; stops early when time is out."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.times = seconds, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        late = self.times[-1] - self.times[0] > self.seconds
        return torch.full((input_ids.shape[0],), late, dtype=torch.bool)


def main() -> None:
    args = common.arguments(__doc__)
    load = common.workload(args)
    set_up(args)
    # What every torch process has, whichever the model: the libraries' own memory is not counted.
    torch.nn.functional.linear(torch.ones(4, 4), torch.ones(4, 4), None)
    memory = common.Memory()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    memory.start_peak()

    results: dict[str, object] = {"loaded_extra_bytes": memory.now_above(weights)}
    results["finetune"] = load.train / finetune_seconds(model, load)
    results["finetune_peak_bytes"] = memory.peak_above(weights)
    model.eval()
    with torch.no_grad():
        for batch in (1, load.batch):
            seconds = common.median_seconds(lambda batch=batch: decode_seconds(model, batch, load), load)
            results[f"decode_{batch}"] = batch * load.decode / seconds
        prompt = torch.tensor([common.ids(load.prefill, model.config.vocab_size, 1)])
        # As generate does it: logits of the last position only.
        seconds = common.median_seconds(lambda: run_prefill(model, prompt), load)
        results["prefill"] = load.prefill / seconds
    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    common.finish(versions, results, load)


def set_up(args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def run_prefill(model, prompt) -> None:
    model(prompt, use_cache=True, logits_to_keep=1)


def decode_seconds(model, batch: int, load: common.Workload) -> float:
    """From the first token on; of load.decode tokens, were it cut short."""
    prompts = torch.tensor([common.ids(load.prompt, model.config.vocab_size, k) for k in range(batch)])
    clock = Clock(load.seconds / 2)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=load.decode + 1,
        min_new_tokens=load.decode + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1) * load.decode


def finetune_seconds(model, load: common.Workload) -> float:
    """Of an optimizer step on one sequence. The adapter is taken off again."""
    tuned, step = finetuning(model, load)
    step(32, 1)
    seconds = common.median_seconds(lambda: step(load.train, 1), load)
    for parameter in tuned.parameters():
        parameter.grad = None
    tuned.unload()
    return seconds


def finetuning(model, load: common.Workload):
    """LoRA at every linear, and a function that takes an optimizer step on a random sequence (tokens, seed)."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=load.rank, lora_alpha=load.alpha, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)

    def step(tokens: int, seed: int) -> None:
        row = torch.tensor([common.ids(tokens, model.config.vocab_size, seed)])
        tuned(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return tuned, step


if __name__ == "__main__":
    main()
