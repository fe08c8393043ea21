"""What PEFT and torch make of the same model, adapter and examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

import flexcore as fc


def peft_adapter(hf: Any, seed: int, scale: float = 0.05, **config: Any) -> Any:
    """A PEFT model on a copy of `hf`, with random A and B: a new adapter's B is zero, and so would be A's gradient."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(copy.deepcopy(hf), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, scale, generator=generator)
    return model


def load_peft(hf: Any, directory: Path, trainable: bool = False) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(hf), directory, is_trainable=trainable)


def in_bfloat16(model: Any) -> Any:
    """A copy with the base in bfloat16 and the adapter in float32, as PEFT trains a model loaded in bfloat16."""
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return rounded


@torch.no_grad()
def logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


def key(parameter_name: str) -> str:
    """The name in adapter_model.safetensors, and in Engine.loss_and_gradients."""
    return parameter_name.replace(".default.", ".")


def loss_sum(model: Any, example: fc.Example) -> tuple[torch.Tensor, int]:
    """Sum of the losses of an example's targets, and their number. One at a time: no padding to get wrong."""
    outputs = model(torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1].float()
    targets = torch.tensor(example.labels[1:])
    total = torch.nn.functional.cross_entropy(outputs, targets, ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


def backward(model: Any, examples: Sequence[fc.Example]) -> float:
    """Accumulates gradients of the mean over all target tokens of all examples; returns that mean."""
    count = sum(sum(label != -100 for label in example.labels[1:]) for example in examples)
    value = 0.0
    for example in examples:
        loss = loss_sum(model, example)[0] / count
        loss.backward()
        value += loss.item()
    return value


def gradients(model: Any, examples: Sequence[fc.Example]) -> dict[str, Any]:
    """{"loss": float, "<peft key>": array}."""
    model.zero_grad()
    result: dict[str, Any] = {"loss": backward(model, examples)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            result[key(name)] = parameter.grad.numpy().copy()
    return result


def train(
    model: Any,
    batches: Sequence[Sequence[fc.Example]],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    max_grad_norm: float = 1.0,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of every optimizer step, as a plain training loop has them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = optimizer(parameters)
    scheduler = schedule(update) if schedule else None
    for batch in batches:
        update.zero_grad()
        loss = backward(model, batch)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else float("inf"))
        update.step()
        if scheduler is not None:
            scheduler.step()
        yield loss, float(norm)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What a full disk is to a writer: no file grows past `size` bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
