"""Attention over paged keys and values, and its backward in windows.

A page holds block_size tokens of one sequence (PagedAttention: Kwon et al. 2023, arXiv 2309.06180, section 4.1). What
the functions share:

k_pages, v_pages: [num_blocks, num_kv_heads, block_size, head_dim] float of one dtype, contiguous; keys are stored
    rotated; head_dim is a multiple of 8 up to 256
block_tables: [num_seqs, max_blocks] int32, the page of each block of each sequence; entries past its last token are
    free
indptr: [num_seqs + 1] int32, from 0 to num_tokens: sequence i has rows indptr[i] to indptr[i+1] of the batch
positions: [num_seqs] int32, the position of each sequence's first row
"""

from __future__ import annotations

from typing import cast

from flexcore import _ops
from flexcore.ops._arrays import A, Array, dim, empty, give, shape_of


def kv_write(
    k: Array, v: Array, k_pages: Array, v_pages: Array, block_tables: Array, indptr: Array, positions: Array
) -> None:
    """Stores the batch's keys and values in their pages, in place.

    k, v: [num_tokens, num_kv_heads, head_dim] float, k rotated; pages, tables, indptr and positions as in the module's
    description
    """
    _ops.kv_write(k, v, k_pages, v_pages, block_tables, indptr, positions)


def attention(
    q: A,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    indptr: Array,
    positions: Array,
    scale: float,
    sliding_window: int = 0,
) -> tuple[A, A]:
    """Causal grouped-query attention of each row over its sequence's pages, its own token included.

    q: [num_tokens, num_heads, head_dim] float, rotated; num_heads is a multiple of num_kv_heads
    scale: of the scores, 1 / sqrt(head_dim) as a rule
    sliding_window: the row at position p sees positions above p - sliding_window; 0: all
    returns: y like q, and lse [num_tokens, num_heads] float32, the log-sum-exp of the scaled scores, for the backward

    A row's result has the same bits however its sequence is cut into calls and whatever else is in the batch.
    """
    y, lse = empty(q, *shape_of(q)), empty(q, dim(q, 0), dim(q, 1), dtype="float32")
    _ops.attention(q, k_pages, v_pages, block_tables, indptr, positions, scale, sliding_window, y, lse)
    return cast(A, give(q, y)), cast(A, give(q, lse))


def attention_backward_window(
    grad_y: A,
    q: Array,
    y: Array,
    lse: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    position: int,
    grad_k: Array,
    grad_v: Array,
    scale: float,
    sliding_window: int = 0,
) -> tuple[A, A, A]:
    """Backward of `attention` for one window of one sequence: positions [position, position + num_tokens).

    Windows come from the right end of the sequence to the left, cut as one likes. Each adds to grad_k and grad_v of all
    positions that it saw; its own rows are final afterwards (FlexLLM, arXiv 2402.18789, section 6.1).

    grad_y: [num_tokens, num_heads, head_dim] float
    q, y, lse: the window's rows of the forward's input and results
    block_table: [max_blocks] int32, contiguous
    grad_k, grad_v: [>= position + num_tokens, num_kv_heads, head_dim] float32, contiguous; zero before the first
        window; changed in place
    scale, sliding_window: as in the forward
    returns: grad_q like q, and the window's rows of grad_k and grad_v, dtype of grad_y; all of them still rotated
    """
    kv_shape = (dim(grad_y, 0), dim(k_pages, 1), dim(k_pages, 3))
    grad_q = empty(grad_y, *shape_of(q))
    grad_k_rows, grad_v_rows = empty(grad_y, *kv_shape), empty(grad_y, *kv_shape)
    _ops.attention_backward_window(
        grad_y,
        q,
        y,
        lse,
        k_pages,
        v_pages,
        block_table,
        position,
        grad_k,
        grad_v,
        scale,
        sliding_window,
        grad_q,
        grad_k_rows,
        grad_v_rows,
    )
    return cast(A, give(grad_y, grad_q)), cast(A, give(grad_y, grad_k_rows)), cast(A, give(grad_y, grad_v_rows))
