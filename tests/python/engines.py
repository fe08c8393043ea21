"""Engines that the acceptance tests share, and the transformers models that they are held against."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flexcore as fc

THREADS = 2
# The exact mode, with room for every test's sequences; several windows and chunks a sequence.
EXACT: dict[str, Any] = {
    "device": os.environ.get("FLEXCORE_DEVICE", "cpu"),
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "block_size": 8,
    "num_threads": THREADS,
    "slo": fc.SLO(tpot_ms=1e6, ttft_ms=1e6),  # what a step holds then follows from sizes, not from the machine's load
}
# Our name -> that of conftest.tiny_model and what is changed in it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": ("llama3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama_bias": ("llama_bias", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
}

MakeEngine = Callable[..., fc.Engine]


def pool_of(plan: Any) -> int:
    """All pages: what is left for requests, and what training sequences keep and add up in them."""
    return int(plan.kv_pages + plan.saved_activations + plan.gradients - plan.optimizer // 2)


def least_pool(directory: Path, adapter: Any, length: int, within: int = 1, **changes: Any) -> int:
    """Bytes of the smallest pool of pages in which a sequence of `length` tokens trains, or up to `within` more."""

    def fits(count: int) -> bool:
        config = fc.EngineConfig(**(EXACT | changes | {"kv_cache_memory_bytes": count}))
        try:
            fc.plan(directory, config, adapter, length)
        except fc.InvalidArgument:
            return False
        return True

    low, high = 0, 1 << 24
    assert fits(high)
    while high - low > within:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@pytest.fixture(scope="session", autouse=True)
def _quiet_torch() -> None:
    try:
        import torch
        import transformers
    except ImportError:
        return
    # Threads of its OpenMP wait by spinning, which makes a busy machine five times slower; the models are tiny.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_dir(tiny_model: Callable[..., Path]) -> Callable[[str], Path]:
    """The directory of one of MODELS."""
    return lambda name: tiny_model(MODELS[name][0], hidden_size=64, **MODELS[name][1])


@pytest.fixture(scope="session")
def tiny_hf(tiny_dir: Callable[[str], Path]) -> Callable[[str], Any]:
    """The transformers model, float32; do not change it."""
    import torch
    import transformers

    @functools.cache
    def load(name: str) -> Any:
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_dir(name), **options).eval()

    return load


@pytest.fixture(scope="session")
def make_engine(tiny_dir: Callable[[str], Path]) -> MakeEngine:
    """A new engine: make_engine("llama", max_num_seqs=2). The first argument may be a directory."""

    def make(model: str | Path = "llama", **changes: Any) -> fc.Engine:
        directory = tiny_dir(model) if isinstance(model, str) else model
        return fc.Engine(directory, fc.EngineConfig(**(EXACT | changes)))

    return make


@pytest.fixture(scope="session")
def _engines(make_engine: MakeEngine) -> dict[str, fc.Engine]:
    return {}


@pytest.fixture
def shared_engine(make_engine: MakeEngine, _engines: dict[str, fc.Engine]) -> Iterator[Callable[[str], fc.Engine]]:
    """The session's engine of a model. What a test leaves behind in it is removed after the test."""

    def get(name: str) -> fc.Engine:
        if name not in _engines:
            _engines[name] = make_engine(name)
        return _engines[name]

    yield get
    for engine in _engines.values():
        clear(engine)


def clear(engine: fc.Engine) -> None:
    """Ends every job, then every request, and unloads every adapter."""
    for job in engine.jobs():
        if job.status in ("queued", "running", "paused"):
            engine.cancel_job(job.id)
    while engine.has_work():
        engine.step()
    for adapter in engine.adapters():
        engine.unload_adapter(adapter.name)


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_dir: Path) -> Any:
    """The oracle: transformers, float32."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def _smollm2_engine(smollm2_dir: Path) -> fc.Engine:
    config = EXACT | {"max_model_len": 512, "max_num_seqs": 24, "max_num_batched_tokens": 256, "block_size": 16}
    return fc.Engine(smollm2_dir, fc.EngineConfig(**config))


@pytest.fixture
def smollm2_engine(_smollm2_engine: fc.Engine) -> Iterator[fc.Engine]:
    yield _smollm2_engine
    clear(_smollm2_engine)
