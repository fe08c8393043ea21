"""The engine's kernels on arrays: numpy, torch, cupy, or anything with DLPack, on the CPU or a CUDA GPU.

Inputs are read where they lie and outputs are made in the framework of the first argument, so nothing is copied. All
arrays of a call are on one device, and it runs there; those that say how others are laid out (scaling, indptr,
adapter_ids, block tables, the positions of sequences) may be on the CPU as well. On a GPU a call waits for everything
that was given to it before, by anybody, and for its own results: no stream has to be named.
"float" means float32 or bfloat16 (torch's, or numpy's of the package ml_dtypes); sums are float32 everywhere. The
elements of a row must lie side by side, rows may have gaps except where "contiguous" is written. No autograd graph is
recorded: every backward is a function of its own.

A wrong dtype, shape, value or mixture of devices raises `flexcore.InvalidArgument`, an array on a device of another
kind `flexcore.Unsupported`, a GPU that this build or machine has not `flexcore.DeviceError`; the message names the op,
the argument, what came and what was wanted. Results do not depend on the number of threads.
Calls release the GIL; one runs at a time.
"""

from __future__ import annotations

from flexcore._ops import num_threads, set_num_threads
from flexcore.ops._arrays import Array
from flexcore.ops.attention import attention, attention_backward_window, kv_write
from flexcore.ops.elementwise import rms_norm, rms_norm_backward, rotary, silu_mul, silu_mul_backward
from flexcore.ops.projections import linear, linear_backward, lora_backward, lora_forward
from flexcore.ops.training import adamw_, linear_cross_entropy, sample

__all__ = [
    "Array",
    "adamw_",
    "attention",
    "attention_backward_window",
    "kv_write",
    "linear",
    "linear_backward",
    "linear_cross_entropy",
    "lora_backward",
    "lora_forward",
    "num_threads",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "sample",
    "set_num_threads",
    "silu_mul",
    "silu_mul_backward",
]
