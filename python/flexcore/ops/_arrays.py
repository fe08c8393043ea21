"""Outputs in the caller's framework. Arguments are judged by the compiled module, which reads them first."""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeVar

import numpy as np

from flexcore._core import Unsupported

_GPU = (2, 13)  # DLPack's numbers of CUDA memory, plain and managed


class Array(Protocol):
    """Anything that shares its memory through DLPack: numpy, torch, jax, cupy, ..."""

    def __dlpack__(self) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...


A = TypeVar("A", bound=Array)


def dim(array: Any, axis: int) -> int:
    """An extent, 0 where there is none: the op itself refuses such an array."""
    shape = getattr(array, "shape", ())
    return int(shape[axis]) if -len(shape) <= axis < len(shape) else 0


def shape_of(array: Any) -> tuple[int, ...]:
    """Of at least one dimension, for the same reason."""
    return tuple(getattr(array, "shape", ())) or (0,)


def _torch(array: Any) -> Any:
    """The torch module if this is a tensor of it; it is not imported otherwise."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def _cupy(array: Any) -> Any:
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else None


def _on_gpu(array: Any) -> bool:
    try:
        return int(array.__dlpack_device__()[0]) in _GPU
    except Exception:  # no such method, or it fails: the compiled module says what is wrong
        return False


def empty(like: Any, *shape: int, dtype: str | None = None) -> Any:
    """Memory for an output, on the device of `like`: a torch tensor for one, cupy's for its own, else a numpy array.
    `dtype` None: that of `like`."""
    torch = _torch(like)
    if torch is not None:
        return like.new_empty(shape, dtype=like.dtype if dtype is None else getattr(torch, dtype), requires_grad=False)
    cupy = _cupy(like)
    if cupy is not None:
        with like.device:
            return cupy.empty(shape, like.dtype if dtype is None else dtype)
    if not isinstance(like, np.ndarray) and _on_gpu(like):
        raise Unsupported(f"an output beside {type(like).__name__} on a GPU, wanted arrays of torch or cupy there")
    if dtype is None:
        own = getattr(like, "dtype", None)
        return np.empty(shape, own if isinstance(own, np.dtype) else "float32")  # jax's dtypes are numpy's
    return np.empty(shape, dtype)


def zeros(like: Any, *shape: int, dtype: str) -> Any:
    out = empty(like, *shape, dtype=dtype)
    out[...] = 0
    return out


def give(like: Any, out: Any) -> Any:
    """An output made by `empty` as an array of the framework of `like`, over the same memory."""
    if isinstance(like, np.ndarray) or _torch(like) or _cupy(like) or not hasattr(like, "__array_namespace__"):
        return out
    namespace = like.__array_namespace__()
    # numpy does not export its bfloat16.
    return namespace.asarray(out) if out.dtype.name == "bfloat16" else namespace.from_dlpack(out)
