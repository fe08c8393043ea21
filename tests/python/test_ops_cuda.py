"""fc.ops on a GPU's arrays: the same as on the CPU, on the same device, whatever stream made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import flexcore as fc

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
try:
    fc.ops.rms_norm(torch.ones(1, 8, device="cuda"), torch.ones(8, device="cuda"))
except fc.DeviceError as error:
    pytest.skip(f"flexcore cannot use the GPU: {error}", allow_module_level=True)


def randn(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def everywhere(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def compare(call: Callable[..., Any], *arguments: Any, tolerance: float = 2e-5) -> None:
    """On the GPU, what is on the CPU; arguments that were made or changed in place come last and are compared too."""
    on_cpu, on_gpu = ([everywhere(a, d) for a in arguments] for d in ("cpu", "cuda"))
    wanted, got = call(*on_cpu), call(*on_gpu)
    if not isinstance(got, tuple):
        wanted, got = (wanted,), (got,)
    for w, g in [*zip(wanted, got, strict=True), *zip(on_cpu, on_gpu, strict=True)]:
        if isinstance(g, torch.Tensor):
            assert g.device == torch.device("cuda", 0) and g.dtype == w.dtype
            torch.testing.assert_close(g.cpu(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_linears(dtype: Any, tolerance: float) -> None:
    x, weight, bias = randn(33, 40, dtype=dtype), randn(24, 40, dtype=dtype), randn(24)
    compare(fc.ops.linear, x, weight, bias, tolerance=tolerance)
    compare(fc.ops.linear_backward, randn(33, 24, dtype=dtype), weight, tolerance=tolerance)


@pytest.mark.parametrize("indices", ["cpu", "cuda"])
def test_lora_of_a_ragged_batch(indices: str) -> None:
    x, weight, a, b = randn(33, 40), randn(24, 40), randn(3, 4, 40), randn(3, 24, 4)
    scaling, indptr, ids = torch.tensor([0.5, 2.0, -1.0]), ints(0, 3, 20, 33), ints(2, -1, 0)
    layout = [everywhere(t, indices) for t in (scaling, indptr, ids)]

    def forward(*tensors: Any) -> Any:
        return fc.ops.lora_forward(*tensors, *layout)

    def backward(*tensors: Any) -> Any:
        return fc.ops.lora_backward(*tensors, *layout)

    if indices == "cpu":
        compare(forward, x, weight, a, b, tolerance=1e-4)
        compare(backward, randn(33, 24), x, weight, a, b, tolerance=1e-3)
        return
    wanted = fc.ops.lora_forward(x, weight, a, b, scaling, indptr, ids)
    got = forward(*(t.cuda() for t in (x, weight, a, b)))
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_elementwise() -> None:
    x, weight = randn(7, 48), randn(48)
    compare(fc.ops.rms_norm, x, weight)
    compare(fc.ops.rms_norm_backward, randn(7, 48), x, weight)
    compare(fc.ops.silu_mul, x, randn(7, 48))
    compare(fc.ops.silu_mul_backward, randn(7, 48), x, randn(7, 48))
    compare(fc.ops.rotary, randn(7, 2, 24), ints(*range(7)), randn(9, 12), randn(9, 12))


def test_attention_and_its_backward() -> None:
    tokens, heads, kv_heads, dim, block = 21, 4, 2, 16, 8
    q, k, v = randn(tokens, heads, dim), randn(tokens, kv_heads, dim), randn(tokens, kv_heads, dim)
    table, indptr, positions = ints(2, 0, 1).reshape(1, 3), ints(0, tokens), ints(0)
    results = {}
    for device in ("cpu", "cuda"):
        pages = [torch.zeros(3, kv_heads, block, dim, device=device) for _ in range(2)]
        on = [t.to(device) for t in (q, k, v)]
        fc.ops.kv_write(on[1], on[2], *pages, table, indptr, positions)
        y, lse = fc.ops.attention(on[0], *pages, table, indptr, positions, dim**-0.5)
        sums = [torch.zeros(tokens, kv_heads, dim, device=device) for _ in range(2)]
        grad_y = randn(tokens, heads, dim).to(device)
        back = fc.ops.attention_backward_window(grad_y, on[0], y, lse, *pages, table[0], 0, *sums, dim**-0.5)
        results[device] = [*pages, y, lse, *sums, *back]
    for wanted, got in zip(results["cpu"], results["cuda"], strict=True):
        assert got.is_cuda
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_loss_optimizer_and_sampling() -> None:
    hidden, weight, labels = randn(9, 24), randn(70, 24), ints(*range(3, 12))
    compare(fc.ops.linear_cross_entropy, hidden, weight, labels, 0.25, tolerance=1e-4)
    compare(fc.ops.linear_cross_entropy, hidden, weight, labels)

    def step(param: Any, grad: Any, first: Any, second: Any) -> Any:
        fc.ops.adamw_(param, grad, first, second, 3, learning_rate=0.1, weight_decay=0.1)
        return param

    compare(step, randn(65), randn(65) * 2, randn(65) * 3, randn(65).square())
    compare(fc.ops.sample, randn(5, 300), 0.0, tolerance=1e-4)
    compare(fc.ops.sample, randn(5, 300), 0.9, 20, 0.95, 0.0, 11, tolerance=1e-4)


def test_what_another_stream_is_writing_is_waited_for() -> None:
    stream, x, weight = torch.cuda.Stream(), torch.zeros(64, 4096, device="cuda"), torch.ones(4096, device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 1e-2
        x.fill_(3.0)
    y = fc.ops.rms_norm(x, weight)
    torch.testing.assert_close(y, torch.ones_like(y))


def test_a_mixture_of_devices_is_refused() -> None:
    with pytest.raises(fc.InvalidArgument, match="linear: weight is on cpu, x on cuda:0, wanted both on one device"):
        fc.ops.linear(torch.ones(2, 8, device="cuda"), torch.ones(3, 8))


def test_the_current_device_stays() -> None:
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    x, weight = torch.ones(2, 8, device=f"cuda:{last}"), torch.ones(8, device=f"cuda:{last}")
    assert fc.ops.rms_norm(x, weight).get_device() == last
    assert torch.cuda.current_device() == before
