"""The kernels of one engine step on CUDA in bfloat16: bytes and FLOPs that each launch cannot do without, and how many
launches they are.

Bytes: each launch reads each of its inputs once and writes each of its outputs once; what stays in a cache between two
launches is counted all the same. FLOPs are those of the mathematics; that LoRA's float32 operands take two or three
tensor-core products is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexcore.bench._cuda_launches import (
    Card,
    Lora,
    Span,
    attention_backward_splits,
    attention_forward_splits,
    cross_entropy_launches,
    lora_backward_launches,
    lora_forward_launches,
)
from flexcore.bench._shapes import Shape


@dataclass(frozen=True)
class Kernel:
    """All launches of one kind in a step."""

    name: str
    bytes: float
    flops: float
    launches: int
    rate: str = "bfloat16"  # or float32: which peak bounds its arithmetic

    def memory_seconds(self, card: Card) -> float:
        return self.bytes / card.bytes_per_s

    def arithmetic_seconds(self, card: Card) -> float:
        return self.flops / (card.bfloat16_flops if self.rate == "bfloat16" else card.float32_flops)

    def seconds(self, card: Card) -> float:
        return max(self.memory_seconds(card), self.arithmetic_seconds(card))

    def times(self, count: int) -> Kernel:
        return Kernel(self.name, count * self.bytes, count * self.flops, count * self.launches, self.rate)


def elementwise(name: str, bytes: float, launches: int = 1, flops: float = 0) -> Kernel:
    return Kernel(name, bytes, flops, launches, "float32")


def linear(
    name: str,
    rows: int,
    inputs: int,
    outputs: Sequence[int],
    out_size: int = 2,
    add: bool = False,
    joined: bool = True,
) -> Kernel:
    """y = x W^T of linears with one input; `add`: y is read too. `joined`: their outputs lie side by side, so that one
    GEMM makes all of them."""
    gemms, written = 1 if joined else len(outputs), out_size * (2 if add else 1)
    bytes = (2 * inputs + written * rows) * sum(outputs) + gemms * 2 * rows * inputs
    return Kernel(name, bytes, 2 * rows * inputs * sum(outputs), gemms)


def linear_backward(name: str, rows: int, inputs: int, outputs: Sequence[int], joined: bool = True) -> Kernel:
    """grad x = sum of grad y W in float32, in one GEMM or in one each, of which all but the first add to it."""
    gemms = 1 if joined else len(outputs)
    bytes = (2 * inputs + 2 * rows) * sum(outputs) + 4 * rows * inputs * (2 * gemms - 1)
    return Kernel(name, bytes, 2 * rows * inputs * sum(outputs), gemms)


def lora_forward(name: str, lora: Lora, inputs: int, outputs: Sequence[int], out_size: int = 2) -> Kernel:
    """y += scaling (x A^T) B^T: x, A and B of every adapter in the batch, u out and in, y in and out."""
    rows, adapters = lora.rows, sum(count > 0 for count in lora.segments)
    matrices = 4 * adapters * lora.rank * sum(inputs + out for out in outputs)
    moved = 2 * rows * inputs + 8 * rows * lora.rank * len(outputs) + 2 * out_size * rows * sum(outputs)
    flops = 2 * rows * lora.rank * sum(inputs + out for out in outputs)
    return Kernel(name, matrices + moved, flops, lora_forward_launches(lora))


def lora_backward(
    card: Card, name: str, lora: Lora, inputs: int, outputs: Sequence[int], grad_size: int, input_grad: bool = True
) -> Kernel:
    """u and grad u (shrink), grad A and grad B, grad x; x and grad y are read twice."""
    rows, adapters, members = lora.rows, sum(count > 0 for count in lora.segments), len(outputs)
    a, b = 4 * adapters * lora.rank * inputs * members, 4 * adapters * lora.rank * sum(outputs)
    u = 4 * rows * lora.rank * members
    bytes = 2 * (2 * rows * inputs + grad_size * rows * sum(outputs)) + 4 * u + a + b + 2 * (a + b)
    flops = 4 * rows * lora.rank * (inputs * members + sum(outputs))
    if input_grad:
        bytes += 8 * rows * inputs + a + u
        flops += 2 * rows * lora.rank * inputs * members
    launches = lora_backward_launches(card, lora, inputs, outputs, grad_size == 2, input_grad)
    return Kernel(name, bytes, flops, launches)


def _forward_layer(card: Card, shape: Shape, spans: Sequence[Span], lora: Lora | None) -> list[Kernel]:
    s, rows = shape, sum(span.tokens for span in spans)
    cached = 4 * s.kv * sum(span.context for span in spans)  # keys and values
    merges = attention_forward_splits(card, spans, s.heads, s.kv_heads, s.head_dim)
    norm = elementwise("rms_norm", 6 * rows * s.hidden + 4 * s.hidden, flops=4 * rows * s.hidden)
    # Norms of heads want them without gaps.
    kernels = [norm, linear("linear q, k, v", rows, s.hidden, (s.q, s.kv, s.kv), joined=not s.qk_norm)]
    if s.qkv_bias:
        kernels.append(elementwise("bias to bfloat16", 6 * (s.q + 2 * s.kv), 3))
    if lora:
        kernels.append(lora_forward("LoRA q, k, v", lora, s.hidden, (s.q, s.kv, s.kv)))
    if s.qk_norm:
        kernels.append(elementwise("rms_norm q, k", 4 * rows * (s.q + s.kv), 2))
    kernels += [
        elementwise("rotary q, k", 4 * rows * (s.q + s.kv) + 8 * rows * s.head_dim, 2),
        elementwise("kv_write", 8 * rows * s.kv),
        Kernel(
            "attention",
            cached + 4 * rows * s.q + 4 * rows * s.heads,
            4 * s.q * sum(span.pairs for span in spans),
            1 + merges,
        ),
        linear("linear o", rows, s.q, (s.hidden,), 4, add=True),
    ]
    if lora:
        kernels.append(lora_forward("LoRA o", lora, s.q, (s.hidden,), 4))
    kernels += [norm, linear("linear gate, up", rows, s.hidden, (s.wide, s.wide))]
    if lora:
        kernels.append(lora_forward("LoRA gate, up", lora, s.hidden, (s.wide, s.wide)))
    kernels.append(elementwise("silu_mul", 6 * rows * s.wide))
    kernels.append(linear("linear down", rows, s.wide, (s.hidden,), 4, add=True))
    if lora:
        kernels.append(lora_forward("LoRA down", lora, s.wide, (s.hidden,), 4))
    return kernels


def _merged(kernels: Sequence[Kernel]) -> list[Kernel]:
    """One row a name."""
    found: dict[str, Kernel] = {}
    for k in kernels:
        if k.name in found:
            old = found[k.name]
            k = Kernel(k.name, old.bytes + k.bytes, old.flops + k.flops, old.launches + k.launches, k.rate)
        found[k.name] = k
    return list(found.values())


def _trunk(card: Card, shape: Shape, spans: Sequence[Span], lora: Lora | None) -> list[Kernel]:
    rows = sum(span.tokens for span in spans)
    layer = _merged(_forward_layer(card, shape, spans, lora))
    embedding = elementwise("embedding", 6 * rows * shape.hidden)
    return [embedding, *(kernel.times(shape.num_layers) for kernel in layer)]


def serving_step(card: Card, shape: Shape, spans: Sequence[Span], lora: Lora | None = None) -> list[Kernel]:
    """Decode rows (spans of one token) or chunks of prompts; one token is sampled for each span."""
    s, sampled = shape, len(spans)
    kernels = [
        *_trunk(card, shape, spans, lora),
        elementwise("gather_rows", 8 * sampled * s.hidden),
        elementwise("rms_norm", 6 * sampled * s.hidden + 4 * s.hidden),
        linear("linear lm_head", sampled, s.hidden, (s.vocab_size,), 4),
        elementwise("sample", 4 * sampled * s.vocab_size, 2),  # peaks; greedy draws from them
    ]
    return _merged(kernels)


def finetune_forward(card: Card, shape: Shape, span: Span, lora: Lora) -> list[Kernel]:
    """A window of one training sequence, all rows with a target: what the backward reads is kept, the loss taken."""
    s, rows = shape, span.tokens
    kept = [
        6 * rows * s.hidden,
        *[4 * rows * s.q] * 2,
        8 * rows * s.heads,
        6 * rows * s.hidden,
        *[4 * rows * s.wide] * 2,
    ]
    if s.qk_norm:  # before the norms, from which the rotated ones are rebuilt
        kept.append(4 * rows * s.kv)
    gemms, others = cross_entropy_launches(card, rows, s.vocab_size)
    head = s.vocab_size * s.hidden
    kernels = [
        *_trunk(card, shape, [span], lora),
        # The first layer's input is rebuilt from the tokens.
        elementwise("keep activations", s.num_layers * sum(kept) - kept[0], s.num_layers * len(kept) - 1),
        elementwise("gather_rows", 8 * rows * s.hidden),
        elementwise("rms_norm", 6 * rows * s.hidden + 4 * s.hidden),
        Kernel("linear_cross_entropy", 4 * head + 6 * rows * s.hidden, 4 * rows * head, gemms + others),
        elementwise("rms_norm_backward", 12 * rows * s.hidden + 4 * s.hidden),
        elementwise("scatter_rows", 8 * rows * s.hidden),
    ]
    return _merged(kernels)


def backward_unit(card: Card, shape: Shape, span: Span, lora: Lora, first_layer: bool = False) -> list[Kernel]:
    """One layer's backward of a window. Below the first layer's bypasses nothing wants a gradient."""
    s, rows = shape, span.tokens
    norm_backward = elementwise("rms_norm_backward", 14 * rows * s.hidden + 4 * s.hidden)
    converted = elementwise("gradient to bfloat16", 6 * rows * s.hidden)
    cached, pairs = 4 * s.kv * span.context, s.q * span.pairs
    merges = attention_backward_splits(card, [span], s.heads, s.kv_heads, s.head_dim)
    kernels = [
        elementwise("rebuild rms_norm", 4 * rows * s.hidden, 2),
        elementwise("rebuild silu_mul", 6 * rows * s.wide),
        converted,
        linear_backward("linear_backward down", rows, s.wide, (s.hidden,)),
        lora_backward(card, "LoRA backward down", lora, s.wide, (s.hidden,), 4),
        elementwise("silu_mul_backward", 12 * rows * s.wide),
        linear_backward("linear_backward gate, up", rows, s.hidden, (s.wide, s.wide)),
        lora_backward(card, "LoRA backward gate, up", lora, s.hidden, (s.wide, s.wide), 2),
        norm_backward,
        converted,
        linear_backward("linear_backward o", rows, s.q, (s.hidden,)),
        lora_backward(card, "LoRA backward o", lora, s.q, (s.hidden,), 4),
        elementwise("attention's gradient to bfloat16", 6 * rows * s.q),
        elementwise("attention delta", 4 * rows * s.q + 4 * rows * s.heads),
        Kernel(
            "attention grad_k, grad_v",
            4 * rows * s.q + cached + 16 * s.kv * span.context + 4 * rows * s.kv,
            8 * pairs,
            1,
        ),
        Kernel("attention grad_q", 6 * rows * s.q + cached, 6 * pairs, 1 + merges),
        elementwise("rotary backward", 4 * rows * (s.q + s.kv) + 8 * rows * s.head_dim, 2),
    ]
    if s.qk_norm:
        kernels.append(elementwise("rebuild rms_norm, rotary q", 8 * rows * s.q, 2))
        kernels.append(elementwise("rms_norm_backward q, k", 6 * rows * (s.q + s.kv), 2))
    outputs = (s.q, s.kv, s.kv)
    if first_layer:
        kernels.append(elementwise("rebuild embedding", 6 * rows * s.hidden))
    else:
        kernels.append(linear_backward("linear_backward q, k, v", rows, s.hidden, outputs, joined=not s.qk_norm))
        kernels.append(norm_backward)
    kernels.append(lora_backward(card, "LoRA backward q, k, v", lora, s.hidden, outputs, 2, input_grad=not first_layer))
    return _merged(kernels)


def launches(kernels: Sequence[Kernel]) -> int:
    return sum(kernel.launches for kernel in kernels)


def seconds(kernels: Sequence[Kernel], card: Card) -> float:
    return sum(kernel.seconds(card) for kernel in kernels)
