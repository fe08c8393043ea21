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


METHODS: dict[str, Any] = {
    "ia3": lambda **fields: peft.IA3Config(
        **({"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]} | fields)
    ),
    "dora": lambda **fields: peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True} | fields)
    ),
}


def method_adapter(hf: Any, method: str, seed: int, **fields: Any) -> Any:
    """A PEFT model of another method on a copy of `hf`; every trainable number is moved by chance."""
    model = peft.get_peft_model(copy.deepcopy(hf), METHODS[method](task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.empty_like(parameter).normal_(generator=generator)
                parameter.add_(noise * (0.05 if parameter.ndim == 2 and min(parameter.shape) > 1 else 0.2 * parameter))
    return model


class Bottleneck(torch.nn.Module):
    """A linear with a bottleneck adapter behind it (Houlsby et al. 2019), or beside it (He et al. 2021)."""

    def __init__(self, base: torch.nn.Linear, config: fc.BottleneckConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.config = base, config
        width = base.in_features if config.use_parallel_adapter else base.out_features
        self.adapter_down = torch.nn.Linear(width, config.bottleneck_size, bias=False)
        self.adapter_up = torch.nn.Linear(config.bottleneck_size, base.out_features, bias=False)
        with torch.no_grad():
            for linear in (self.adapter_down, self.adapter_up):
                linear.weight.normal_(0.0, 0.1, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}.get(
            self.config.non_linearity, torch.tanh
        )
        inner = act(self.adapter_down(x if self.config.use_parallel_adapter else y))
        return y + self.config.scaling * self.adapter_up(inner)


def bottleneck_adapter(hf: Any, config: fc.BottleneckConfig, seed: int) -> Any:
    """A copy of `hf` with the adapters, which alone are trainable."""
    model = copy.deepcopy(hf).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] in config.target_modules:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Bottleneck(module, config, generator))
    return model


def save_bottleneck(model: Any, config: fc.BottleneckConfig, directory: Path) -> None:
    """As LLM-Adapters' PEFT names things."""
    import json

    from safetensors.torch import save_file

    directory.mkdir()
    tensors = {f"base_model.model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {name: getattr(config, name) for name in config._fields}
    (directory / "adapter_config.json").write_text(json.dumps(fields | {"peft_type": "BOTTLENECK"}))


def philox(seed: int, counter: tuple[Any, Any, Any, Any]) -> list[Any]:
    """Philox 4x32-10 (Salmon et al. 2011) of arrays of counters."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    x = [np.asarray(c, np.uint64) for c in np.broadcast_arrays(*counter)]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(b >> np.uint64(32)) ^ x[1] ^ key[0], b & low, (a >> np.uint64(32)) ^ x[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return x


def dropout_mask(p: float, seed: int, sequence: int, module: int, length: int, width: int) -> np.ndarray:
    """What ops/dropout.h says, in numpy: [length, width] of 0 and 1 / (1 - p)."""
    feature = np.arange(width, dtype=np.uint64)
    words = philox(seed, (feature // 128 * 16 + feature % 16, np.arange(length)[:, None], module, sequence))
    n = (feature % 128 // 16).astype(int)
    word = np.choose(n // 2, words)
    number = np.where(n % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    threshold = round(p * 65536)
    return np.where(number < threshold, 0.0, 65536 / (65536 - threshold)).astype(np.float32)


class Masked(torch.nn.Module):
    """In place of a LoRA module's dropout: the masks of one sequence."""

    def __init__(self, p: float, seed: int, module: int) -> None:
        super().__init__()
        self.p, self.seed, self.module, self.sequence = p, seed, module, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = dropout_mask(self.p, self.seed, self.sequence, self.module, x.shape[-2], x.shape[-1])
        return x * torch.from_numpy(mask)


SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a layer, in flexcore's order


def mask_dropouts(model: Any, p: float, seed: int) -> list[Masked]:
    """Gives a PEFT model flexcore's masks."""
    masks = []
    for path, module in model.named_modules():
        if hasattr(module, "lora_dropout") and hasattr(module, "lora_A") and len(module.lora_A):
            parts = path.split(".")
            site = len(model.get_base_model().model.layers) * len(SITES) + 1  # lm_head's, behind the embedding's
            if "layers" in parts:
                site = int(parts[parts.index("layers") + 1]) * len(SITES) + SITES.index(parts[-1])
            module.lora_dropout["default"] = Masked(p, seed, site)
            masks.append(module.lora_dropout["default"])
    return masks


def virtual_adapter(hf: Any, kind: str, count: int, seed: int) -> Any:
    """PEFT's prompt or prefix tuning on a copy of `hf`, with random virtual tokens."""
    make = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    model = peft.get_peft_model(copy.deepcopy(hf), make(task_type="CAUSAL_LM", num_virtual_tokens=count))
    with torch.no_grad():
        weight = model.prompt_encoder["default"].embedding.weight
        weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(seed))
    return model


def virtual_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[len, vocab_size] of the tokens, those of a prompt's virtual ones left out."""
    return model(input_ids=torch.tensor([list(tokens)])).logits[0, -len(tokens) :].float()


def virtual_gradients(model: Any, kind: str, examples: Sequence[fc.Example]) -> dict[str, Any]:
    """As gradients(). Behind a prompt the first token is a target too."""
    model.zero_grad()
    first = 0 if kind == "prompt" else 1
    count = sum(sum(label != -100 for label in example.labels[first:]) for example in examples)
    value = 0.0
    for example in examples:
        outputs = model(input_ids=torch.tensor([example.input_ids])).logits[0].float()
        outputs = outputs[-len(example.input_ids) - 1 + first : -1]
        targets = torch.tensor(example.labels[first:])
        total = torch.nn.functional.cross_entropy(outputs, targets, ignore_index=-100, reduction="sum")
        (total / count).backward()
        value += total.item() / count
    return {"loss": value, "prompt_embeddings": model.prompt_encoder["default"].embedding.weight.grad.numpy().copy()}
