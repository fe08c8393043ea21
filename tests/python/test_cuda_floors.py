"""The plan of the CUDA kernels: formulas on small numbers, totals that are known otherwise, and counted launches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexcore.bench import _cuda_floors as floors
from flexcore.bench._cuda_launches import Card, Lora, Span, cross_entropy_launches, lora_forward_launches
from flexcore.bench._shapes import PRESETS, Shape

CARD = Card()
LLAMA = PRESETS["llama-3.1-8b"]
COUNTED = json.loads((Path(__file__).parents[1] / "simt" / "launches.json").read_text())


def finetune_launches(card: Card, shape: Shape, step: dict[str, Any], rank: int) -> int:
    """A sequence forth and back, cut as Engine.loss_and_gradients cuts it."""
    length, total = step["tokens"], 0
    for begin in range(0, length, step["window"]):
        span = Span(min(step["window"], length - begin), begin)
        total += floors.launches(floors.finetune_forward(card, shape, span, Lora(rank, (span.tokens,))))
    for layer in range(shape.num_layers):
        left = length
        while left > 0:
            count = min(left, step["backward_window"])
            span = Span(count, left - count)
            unit = floors.backward_unit(card, shape, span, Lora(rank, (count,)), first_layer=layer == 0)
            total += floors.launches(unit)
            left -= count
    return total


def serving_launches(card: Card, shape: Shape, step: dict[str, Any], rank: int) -> int:
    prompts = step["prompts"]
    spans = [Span(1, length) if step["step"] == "decode" else Span(length) for length in prompts]
    rows = [0] * step["adapters"]
    for i, span in enumerate(spans if rows else ()):
        rows[i * len(rows) // len(spans)] += span.tokens
    lora = Lora(rank, tuple(rows)) if rows else None
    return floors.launches(floors.serving_step(card, shape, spans, lora))


@pytest.mark.parametrize(
    ("config", "step"),
    [(model["config"], step) for model in COUNTED["models"] for step in model["steps"]],
    ids=lambda value: value.get("model_type") or "-".join(str(v) for v in value.values()),
)
def test_launches_are_those_that_were_counted(config: dict[str, Any], step: dict[str, Any]) -> None:
    card = Card(multiprocessors=COUNTED["multiprocessors"], l2_bytes=COUNTED["l2_bytes"])
    shape = Shape.from_config("tiny", config)
    count = finetune_launches if step["step"] == "finetune" else serving_launches
    assert count(card, shape, step, COUNTED["rank"]) == step["launches"]


def test_one_linear_by_hand() -> None:
    kernel = floors.linear("y", rows=3, inputs=5, outputs=(7, 11))
    weights, inputs, outputs = 2 * 5 * 18, 2 * (2 * 3 * 5), 2 * 3 * 18
    assert (kernel.bytes, kernel.flops, kernel.launches) == (weights + inputs / 2 + outputs, 2 * 3 * 5 * 18, 1)
    apart = floors.linear("y", rows=3, inputs=5, outputs=(7, 11), joined=False)
    assert (apart.bytes, apart.flops, apart.launches) == (weights + inputs + outputs, 2 * 3 * 5 * 18, 2)
    residual = floors.linear("y", rows=3, inputs=5, outputs=(7,), out_size=4, add=True)
    assert residual.bytes == 2 * 5 * 7 + 2 * 3 * 5 + 2 * 4 * 3 * 7
    backward = floors.linear_backward("x", rows=3, inputs=5, outputs=(7, 11))
    assert backward.bytes == 2 * 5 * 18 + 2 * 3 * 18 + 4 * 3 * 5
    backward = floors.linear_backward("x", rows=3, inputs=5, outputs=(7, 11), joined=False)
    assert backward.bytes == 2 * 5 * 18 + 2 * 3 * 18 + 3 * (4 * 3 * 5)  # written, read, written


def test_one_bypass_by_hand() -> None:
    kernel = floors.lora_forward("y", Lora(rank=2, segments=(3, 1)), inputs=5, outputs=(7,))
    assert kernel.bytes == 2 * 4 * 2 * (5 + 7) + 2 * 4 * 5 + 8 * 4 * 2 + 4 * 4 * 7
    assert kernel.flops == 2 * 4 * 2 * (5 + 7)
    assert [lora_forward_launches(Lora(2, rows)) for rows in ((3,), (9,), (9, 3), (0,))] == [2, 2, 2, 0]


def test_the_slower_of_memory_and_arithmetic_binds() -> None:
    card = Card(bytes_per_s=1e9, bfloat16_flops=4e9, float32_flops=1e9)
    assert floors.Kernel("a", 3e9, 4e9, 1).seconds(card) == 3
    assert floors.Kernel("a", 1e9, 8e9, 1).seconds(card) == 2
    assert floors.Kernel("a", 1e9, 8e9, 1, "float32").seconds(card) == 8


def test_a_decode_step_reads_the_model_once() -> None:
    step = floors.serving_step(CARD, LLAMA, [Span(1, 1023)])
    parameters = LLAMA.multiplied_parameters
    assert parameters == 8_030_261_248 - 128256 * 4096 - 65 * 4096  # without the embedding and the norms
    linears = [kernel for kernel in step if kernel.name.startswith("linear")]
    assert sum(kernel.bytes for kernel in linears) == pytest.approx(2 * parameters, rel=1e-3)
    assert sum(kernel.flops for kernel in linears) == 2 * parameters
    (attention,) = (kernel for kernel in step if kernel.name == "attention")
    assert attention.bytes == pytest.approx(32 * 2 * 2 * 8 * 128 * 1024, rel=0.01)  # keys and values
    assert floors.seconds(step, CARD) == pytest.approx(2 * parameters / CARD.bytes_per_s, rel=0.02)


def test_training_costs_four_operations_a_parameter() -> None:
    window, lora = Span(512), Lora(16, (512,))
    forward = floors.finetune_forward(CARD, LLAMA, window, lora)
    units = [floors.backward_unit(CARD, LLAMA, window, lora, first_layer=layer == 0) for layer in range(32)]
    linears = [k for step in (forward, *units) for k in step if k.name.startswith("linear")]
    # The first layer's q, k and v want no gradient of their input.
    q_k_v = 4096 * (4096 + 2 * 1024)
    assert sum(k.flops for k in linears) == 512 * (4 * LLAMA.multiplied_parameters - 2 * q_k_v)
    attention = sum(k.flops for step in (forward, *units) for k in step if k.name.startswith("attention grad"))
    assert attention == 32 * 14 * 4096 * 512 * 513 / 2  # seven products


def test_a_long_vocabulary_goes_by_in_chunks() -> None:
    assert cross_entropy_launches(CARD, 512, 128256) == (2 * 7, 7 + 1)
    assert cross_entropy_launches(CARD, 16, 128256) == (2, 2 + 1)  # one chunk, whose rows are shared by blocks


@pytest.mark.parametrize("shape", PRESETS.values(), ids=lambda shape: shape.name)
def test_presets_have_their_size(shape: Shape) -> None:
    billions = {"llama-3.1-8b": 8.03, "llama-3.2-3b": 3.21, "llama-3.2-1b": 1.24, "smollm2-135m": 0.1345}
    billions |= {"qwen2.5-7b": 7.62, "qwen3-8b": 8.19}
    embedding = 0 if shape.tied else shape.vocab_size * shape.hidden
    assert (shape.multiplied_parameters + embedding) / 1e9 == pytest.approx(billions[shape.name], rel=0.005)
