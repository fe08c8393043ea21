"""How fc.ops takes and gives arrays: zero-copy, frameworks, dtypes, refusals, threads; and the stub of its module."""

from __future__ import annotations

import ast
import ctypes
import inspect
import multiprocessing
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcore as fc
from flexcore import _ops

RNG = np.random.default_rng(0)


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def address(array: Any) -> int:
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


@pytest.fixture(params=["numpy", "torch"])
def made(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """An array of either framework from a numpy one."""
    if request.param == "numpy":
        return lambda array: array
    return pytest.importorskip("torch").from_numpy


def test_no_array_is_copied(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel gets is what the caller gave; what the caller gets is what the kernel wrote."""
    passed: list[Any] = []
    kernel = _ops.linear

    def spy(*arrays: Any) -> None:
        passed.extend(arrays)
        before = [address(array) for array in arrays if array is not None]
        kernel(*arrays)
        assert [address(array) for array in arrays if array is not None] == before

    monkeypatch.setattr(_ops, "linear", spy)
    x, weight = made(randn(3, 8)), made(randn(5, 8))
    y = fc.ops.linear(x, weight)
    assert type(y) is type(x)
    assert [address(array) for array in (x, weight, y)] == [address(passed[i]) for i in (0, 1, 3)]
    np.testing.assert_allclose(np.asarray(y), np.asarray(x) @ np.asarray(weight).T, rtol=1e-5, atol=1e-6)


def test_no_rows_are_legal(made: Callable[..., Any]) -> None:
    x, weight, a, b = made(randn(0, 8)), made(randn(5, 8)), made(randn(2, 8)), made(randn(5, 2))
    assert fc.ops.linear(x, weight).shape == (0, 5)
    assert fc.ops.lora_forward(x, weight, a, b, 1.0).shape == (0, 5)
    grads = fc.ops.lora_backward(made(randn(0, 5)), x, weight, a, b, 1.0)
    assert [tuple(grad.shape) for grad in grads] == [(0, 8), (2, 8), (5, 2)]
    assert fc.ops.rms_norm(x, made(randn(8)), 1e-5).shape == (0, 8)
    assert fc.ops.silu_mul(x, made(randn(0, 8))).shape == (0, 8)


def test_in_place_means_the_callers_own_memory(made: Callable[..., Any]) -> None:
    param, grad, first, second = (made(randn(4, 6)) for _ in range(4))
    second[...] = 0
    before, places = np.asarray(param).copy(), [address(a) for a in (param, first, second)]
    fc.ops.adamw_(param, grad, first, second, 1, learning_rate=0.1)
    assert [address(a) for a in (param, first, second)] == places
    assert np.abs(np.asarray(param) - before).min() > 0

    # A view of a larger array: only it is written.
    pages = made(np.full((3, 2, 4, 8), 7, np.float32))
    k, v = made(randn(2, 2, 8)), made(randn(2, 2, 8))
    table, indptr, positions = (made(np.array(a, np.int32)) for a in ([[0]], [0, 2], [1]))
    fc.ops.kv_write(k, v, pages[1:2], pages[2:3], table, indptr, positions)
    written = np.asarray(pages)
    assert (written[0] == 7).all() and (written[1:, :, [0, 3]] == 7).all()
    np.testing.assert_array_equal(written[1, :, 1:3], np.asarray(k).transpose(1, 0, 2))
    np.testing.assert_array_equal(written[2, :, 1:3], np.asarray(v).transpose(1, 0, 2))


def test_read_only_arrays_are_inputs_and_no_outputs() -> None:
    x, weight = randn(3, 8), randn(5, 8)
    x.flags.writeable = False
    fc.ops.linear(x, weight)
    with pytest.raises(fc.InvalidArgument, match="adamw: param is read-only"):
        fc.ops.adamw_(x, weight[:3].copy(), weight[:3].copy(), weight[:3].copy(), 1)


def test_torch_parameters_and_graphs() -> None:
    torch = pytest.importorskip("torch")
    param = torch.nn.Parameter(torch.randn(3, 8))
    y = fc.ops.linear(param, param)
    assert not y.requires_grad
    fc.ops.adamw_(param, torch.ones(3, 8), torch.zeros(3, 8), torch.zeros(3, 8), 1)


class Foreign:
    """Nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Namespaced(Foreign):
    def __array_namespace__(self) -> Any:
        class Namespace:
            from_dlpack = staticmethod(lambda array: Namespaced(np.from_dlpack(array)))

        return Namespace


@pytest.mark.parametrize(("kind", "out"), [(Foreign, np.ndarray), (Namespaced, Namespaced)])
def test_any_array_with_dlpack(kind: Any, out: type) -> None:
    x, weight = randn(3, 8), randn(5, 8)
    y = fc.ops.linear(kind(x), kind(weight))
    assert type(y) is out
    np.testing.assert_allclose(getattr(y, "array", y), x @ weight.T, rtol=1e-5, atol=1e-6)


def test_numpy_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, weight = randn(3, 8).astype(ml_dtypes.bfloat16), randn(5, 8).astype(ml_dtypes.bfloat16)
    y = fc.ops.linear(x, weight)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), x.astype(np.float32) @ weight.astype(np.float32).T, rtol=1e-2)


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    jnp, on_cpu = jax.numpy, jax.devices("cpu")[0]
    x, weight = randn(3, 8), randn(5, 8)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        with jax.default_device(on_cpu):
            y = fc.ops.linear(jnp.asarray(x, dtype), jnp.asarray(weight, dtype))
            assert type(y) is type(jnp.asarray(x)) and y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float32), x @ weight.T, rtol=tolerance, atol=tolerance)


class OnCuda:
    """Says that it is on a GPU. With a pointer, so does what it exports: enough for refusals, which read nothing."""

    def __init__(self, array: np.ndarray | None = None, index: int = 0, device_type: int = 2) -> None:
        self.array, self.index, self.device_type = array, index, device_type
        self.shape = (3, 8) if array is None else array.shape

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device_type, self.index)

    def __dlpack__(self, **options: Any) -> Any:
        if self.array is None:
            raise RuntimeError("no such device here")
        ndim = self.array.ndim
        self.sizes = (ctypes.c_int64 * ndim)(*self.array.shape)
        self.managed = ManagedTensor(
            self.array.ctypes.data, self.device_type, self.index, ndim, 2, 32, 1, self.sizes, None, 0, None, None
        )
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


class ManagedTensor(ctypes.Structure):
    """DLManagedTensor of float32 (dlpack.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def test_what_cannot_be_shared_is_unsupported() -> None:
    weight = randn(5, 8)
    with pytest.raises(fc.Unsupported, match="rms_norm: weight is on a device that does not share its memory, wanted"):
        fc.ops.rms_norm(weight, OnCuda())
    with pytest.raises(fc.Unsupported, match="an output beside OnCuda on a GPU, wanted arrays of torch or cupy"):
        fc.ops.linear(OnCuda(), weight)
    with pytest.raises(fc.Unsupported, match="rms_norm: weight is on DLPack device 10, wanted the CPU or a CUDA GPU"):
        fc.ops.rms_norm(weight, OnCuda(randn(8), device_type=10))


def test_arrays_of_a_call_are_on_one_device() -> None:
    weight = randn(8)
    with pytest.raises(fc.InvalidArgument, match=r"rms_norm: weight is on cuda:1, x on cpu, wanted both on one device"):
        fc.ops.rms_norm(randn(3, 8), OnCuda(weight, 1))
    state = [OnCuda(randn(4)) for _ in range(4)]
    with pytest.raises(fc.InvalidArgument, match=r"adamw: grad is on cpu, param on cuda:0, wanted both on one device"):
        fc.ops.adamw_(state[0], randn(4), state[2], state[3], 1)
    for device_type in (2, 13):  # managed memory too
        with pytest.raises(fc.InvalidArgument, match=r"exp_avg is on cuda:3, param on cuda:0"):
            fc.ops.adamw_(state[0], state[1], OnCuda(weight, 3, device_type), state[3], 1)


def test_page_locked_memory_is_the_cpus() -> None:
    x, weight = randn(3, 8), randn(8)
    np.testing.assert_array_equal(fc.ops.rms_norm(x, OnCuda(weight, device_type=3)), fc.ops.rms_norm(x, weight))


def test_a_gpu_that_is_not_there_is_a_device_error() -> None:
    with pytest.raises(fc.DeviceError, match="cuda"):
        fc.ops.adamw_(*(OnCuda(randn(4), index=99) for _ in range(4)), 1)


X, W, A, B = randn(6, 8), randn(5, 8), randn(2, 3, 8), randn(2, 5, 3)
I32 = np.int32
# (what the message says, call)
MISTAKES: list[tuple[str, Callable[[], Any]]] = [
    ("linear: x is None", lambda: fc.ops.linear(None, W)),
    (r"linear: x is \[\[1.0\]\] \(list\), wanted an array", lambda: fc.ops.linear([[1.0]], W)),
    ("linear: x is float64", lambda: fc.ops.linear(X.astype(np.float64), W)),
    ("linear: x is float16", lambda: fc.ops.linear(X.astype(np.float16), W)),
    ("linear: x is bool", lambda: fc.ops.linear(X > 0, W)),
    ("linear: x has 0 dimensions", lambda: fc.ops.linear(np.float32(1), W)),
    ("linear: x has 5 dimensions", lambda: fc.ops.linear(X[None, None, None], W)),
    (r"linear: x is float32 \[8\], wanted two", lambda: fc.ops.linear(X[0], W)),
    ("linear: x has stride 6 in its last", lambda: fc.ops.linear(np.asfortranarray(X), W)),
    (r"linear: weight is \[5, 7\], x is", lambda: fc.ops.linear(X, W[:, :7].copy())),
    ("linear: weight is .* with gaps", lambda: fc.ops.linear(X, W[:, ::1][::2])),
    ("linear: weight is .*, wanted two dimensions", lambda: fc.ops.linear(X, W[0])),
    (r"linear: bias is float32 \[8\], wanted \[5\]", lambda: fc.ops.linear(X, W, W[0])),
    (r"linear: bias is float32 \[0\], wanted \[5\]", lambda: fc.ops.linear(X, W, W[0, :0])),
    ("linear_backward: grad_y is", lambda: fc.ops.linear_backward(X, W)),
    ("lora_forward: lora_a is", lambda: fc.ops.lora_forward(X, W, A[0, 0], B, 1.0)),
    ("lora_forward: lora_a is", lambda: fc.ops.lora_forward(X, W, A[0, :, :7].copy(), B[0], 1.0)),
    ("lora_forward: lora_a is int32", lambda: fc.ops.lora_forward(X, W, A[0].astype(I32), B[0], 1.0)),
    ("lora_forward: lora_b is", lambda: fc.ops.lora_forward(X, W, A[0], B, 1.0)),
    ("lora_forward: lora_b is .* with gaps", lambda: fc.ops.lora_forward(X, W, A[0], B[0, ::2], 1.0)),
    ("lora_forward: weight is", lambda: fc.ops.lora_forward(X, W[:4], A[0], B[0], 1.0)),
    ("lora_forward: .* has rank 300", lambda: fc.ops.lora_forward(X, W, randn(300, 8), randn(5, 300), 1.0)),
    ("lora_forward: scaling is", lambda: fc.ops.lora_forward(X, W, A[0], B[0], np.ones(1))),
    ("lora_forward: scaling is", lambda: fc.ops.lora_forward(X, W, A[0], B[0], "2")),
    ("lora_forward: scaling has 3", lambda: fc.ops.lora_forward(X, W, A, B, np.ones(3, np.float32))),
    ("lora_forward: 1 segments of indptr for 2 adapters", lambda: fc.ops.lora_forward(X, W, A, B, 1.0)),
    ("lora_forward: indptr goes", lambda: fc.ops.lora_forward(X, W, A, B, 1.0, np.array([0, 2, 5], I32))),
    ("lora_forward: indptr falls", lambda: fc.ops.lora_forward(X, W, A, B, 1.0, np.array([0, 7, 6], I32))),
    ("lora_forward: indptr is int64", lambda: fc.ops.lora_forward(X, W, A, B, 1.0, np.array([0, 2, 6]))),
    (
        r"lora_forward: adapter_ids\[1\] is 2",
        lambda: fc.ops.lora_forward(X, W, A, B, 1.0, np.array([0, 2, 6], I32), np.array([0, 2], I32)),
    ),
    ("adapter_ids is .* without indptr", lambda: fc.ops.lora_forward(X, W, A, B, 1.0, None, np.array([0], I32))),
    ("lora_backward: grad_y is", lambda: fc.ops.lora_backward(X, X, W, A[0], B[0], 1.0)),
    ("rms_norm: weight is", lambda: fc.ops.rms_norm(X, X[0, :4])),
    ("rms_norm: eps is -1", lambda: fc.ops.rms_norm(X, X[0], -1.0)),
    ("rms_norm: eps is 'a'", lambda: fc.ops.rms_norm(X, X[0], "a")),
    ("rms_norm_backward: grad_y is", lambda: fc.ops.rms_norm_backward(X[:2], X, X[0])),
    (r"rotary: positions\[0\] is 9", lambda: fc.ops.rotary(A, np.array([9, 0], I32), X[:, :4].copy(), X[:, :4].copy())),
    ("silu_mul: up is", lambda: fc.ops.silu_mul(X, W)),
    (r"labels\[0\] is -100", lambda: fc.ops.linear_cross_entropy(X, W, np.full(6, -100, I32))),
    ("labels is int64", lambda: fc.ops.linear_cross_entropy(X, W, np.zeros(6, np.int64))),
    ("grad_scale is", lambda: fc.ops.linear_cross_entropy(X, W, np.zeros(6, I32), np.ones(5, np.float32))),
    ("adamw: exp_avg is", lambda: fc.ops.adamw_(X.copy(), X, X[:2].copy(), X.copy(), 1)),
    ("adamw: step is 0", lambda: fc.ops.adamw_(X.copy(), X, X.copy(), X.copy(), 0)),
    ("adamw: step is 1.5", lambda: fc.ops.adamw_(X.copy(), X, X.copy(), X.copy(), 1.5)),
    ("sample: .*temperature is -1", lambda: fc.ops.sample(X, temperature=-1)),
    ("sample: top_k is", lambda: fc.ops.sample(X, top_k=2**40)),
    ("sample: seed is -1", lambda: fc.ops.sample(X, seed=-1)),
    ("num_threads: -1", lambda: fc.ops.set_num_threads(-1)),
]


@pytest.mark.parametrize(("message", "call"), MISTAKES, ids=[message for message, _ in MISTAKES])
def test_mistakes_are_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(fc.InvalidArgument, match=message):
        call()


def test_threads_change_no_bit() -> None:
    before = fc.ops.num_threads()
    x, weight = randn(90, 200), randn(300, 200)
    results = []
    try:
        for threads in (1, 2, 3):
            fc.ops.set_num_threads(threads)
            assert fc.ops.num_threads() == threads
            results.append(fc.ops.linear(x, weight))
    finally:
        fc.ops.set_num_threads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_calls_of_several_threads_queue() -> None:
    x, weight = randn(300, 700), randn(500, 700)
    wanted = fc.ops.linear(x, weight)
    right: list[bool] = []

    def work() -> None:
        right.extend(bool((fc.ops.linear(x, weight) == wanted).all()) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 20


def test_an_op_releases_the_gil() -> None:
    """Python switches threads only where one lets go: the main thread can stop the other in an op, or not at all."""
    x, weight = randn(300, 700), randn(500, 700)
    started, stop, calls = threading.Event(), threading.Event(), 0

    def work() -> None:
        nonlocal calls
        started.set()
        while not stop.is_set() and calls < 2000:
            fc.ops.linear(x, weight)
            calls += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        stop.set()
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert calls < 2000


def _linear_of_ones(rows: int) -> float:
    return float(fc.ops.linear(np.ones((rows, 300), np.float32), np.ones((400, 300), np.float32)).sum())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own() -> None:
    assert _linear_of_ones(50) == 50 * 400 * 300
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_linear_of_ones, (50,)).get(timeout=20) == 50 * 400 * 300


STUB = ast.parse(Path(fc.__file__).with_name("_ops.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_stub_is_a_snapshot_of_the_module() -> None:
    assert {name for name in vars(_ops) if not name.startswith("_")} == set(FUNCTIONS)
    for name, function in FUNCTIONS.items():
        inside = re.match(r"\w+\((.*)\) -> ", (inspect.getdoc(getattr(_ops, name)) or "").splitlines()[0])
        assert inside, name
        bound = [part.partition(":")[0] for part in filter(None, inside[1].split(", "))]
        assert bound == [argument.arg for argument in function.args.args], name


@pytest.mark.parametrize("name", sorted(set(fc.ops.__all__) - {"Array", "num_threads", "set_num_threads"}))
def test_docstrings_tell_every_parameter(name: str) -> None:
    function = getattr(fc.ops, name)
    text = (function.__doc__ or "") + (sys.modules[function.__module__].__doc__ or "")
    assert "float" in text
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text), parameter
