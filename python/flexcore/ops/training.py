"""Loss, optimizer step, and the choice of a token."""

from __future__ import annotations

from typing import Any, cast

from flexcore import _ops
from flexcore.ops._arrays import A, Array, dim, empty, give, shape_of


def linear_cross_entropy(
    hidden: A, weight: Array, labels: Array, grad_scale: float | Array | None = None
) -> tuple[A, A | None]:
    """Cross-entropy of the logits hidden W^T, which are never in memory: the vocabulary goes by in chunks.

        loss[i] = logsumexp(logits[i]) - logits[i, labels[i]]
        grad_hidden[i] = grad_scale[i] * (softmax(logits[i]) - onehot(labels[i])) W

    hidden: [rows, hidden_size] float
    weight: [vocab_size, hidden_size] float, contiguous
    labels: [rows] int32 in [0, vocab_size), contiguous
    grad_scale: one number, or [rows] float32: 1 / (target tokens of the optimizer step) as a rule; None: loss only
    returns: loss [rows] float32; grad_hidden like hidden, or None

    The softmax is kept online in the same pass (FlexLLM, arXiv 2402.18789, section 6.1: loss at once, logits not kept).
    """
    rows = dim(hidden, 0)
    loss = empty(hidden, rows, dtype="float32")
    grad_hidden = None if grad_scale is None else empty(hidden, *shape_of(hidden))
    scales: Any = grad_scale
    if isinstance(grad_scale, (int, float)):
        scales = empty(hidden, rows, dtype="float32")
        scales[...] = grad_scale
    _ops.linear_cross_entropy(hidden, weight, labels, scales, loss, grad_hidden)
    return cast(A, give(hidden, loss)), None if grad_hidden is None else cast(A, give(hidden, grad_hidden))


def adamw_(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    step: int,
    *,
    learning_rate: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
) -> None:
    """One step of AdamW with decoupled weight decay, in place; the formula is torch.optim.AdamW's.

    param, grad, exp_avg, exp_avg_sq: float32 of one shape, contiguous; all but grad are changed
    step: this step's number, from 1
    learning_rate, betas, eps, weight_decay: as in torch
    grad_scale: multiplies the gradient first (clipping)

    Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2.
    """
    _ops.adamw(param, grad, exp_avg, exp_avg_sq, step, learning_rate, betas[0], betas[1], eps, weight_decay, grad_scale)


def sample(
    logits: A,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    counter: int = 0,
) -> tuple[A, A]:
    """Draws one token a row: temperature, then top_k, top_p and min_p.

    logits: [rows, vocab_size] float32
    temperature: 0 takes the most likely, the lowest id among equals
    top_k, top_p, min_p: keep the k most likely (0 or -1: all); the fewest that reach probability top_p together; those
        at least min_p times as likely as the most likely
    seed, counter: row i's draw depends on (seed, counter + i) and its own logits, on nothing else
    returns: tokens [rows] int32, and their log-probabilities [rows] float32 under the logits as they came

    Raises flexcore.Error when a row has NaN or +infinity, or nothing to choose.
    """
    tokens, logprobs = empty(logits, dim(logits, 0), dtype="int32"), empty(logits, dim(logits, 0), dtype="float32")
    _ops.sample(logits, temperature, top_k, top_p, min_p, seed, counter, tokens, logprobs)
    return cast(A, give(logits, tokens)), cast(A, give(logits, logprobs))
