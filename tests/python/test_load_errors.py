"""Models and adapters that cannot be loaded: damaged files, other architectures, another base, bad settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import MakeEngine
from running import generate, greedy, is_idle

import flexcore as fc

DAMAGE = ["no weights", "truncated", "NaN", "one tensor missing"]


@pytest.fixture
def engine(shared_engine: MakeEngine) -> Iterator[fc.Engine]:
    """After the error it holds nothing new, and serves."""
    shared = shared_engine("llama")
    wanted = generate(shared, [[5, 6, 7]], greedy(8))
    yield shared
    assert generate(shared, [[5, 6, 7]], greedy(8)) == wanted
    assert shared.adapters() == [] and shared.memory()["adapters"] == 0
    assert is_idle(shared)


def change_weights(path: Path, damage: str) -> None:
    from safetensors.numpy import load_file, save_file

    if damage == "no weights":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage in ("NaN", "one tensor missing"):
        tensors = load_file(path)
        name = sorted(tensors)[3]
        if damage == "NaN":
            tensors[name].flat[7] = np.nan
        else:
            del tensors[name]
        save_file(tensors, path, {"format": "pt"})


def test_adapter_for_another_base(engine: fc.Engine, tiny_hf: Any, tmp_path: Path) -> None:
    oracle.peft_adapter(tiny_hf("qwen3"), seed=1, target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(
        fc.InvalidArgument,
        match=r"q_proj.lora_B.weight is \[96, 4\], wanted \[64, 4\]; .*another base model",
    ):
        engine.load_adapter("b", tmp_path)


@pytest.mark.parametrize("damage", ["no directory", "no config", *DAMAGE])
def test_damaged_adapter(damage: str, engine: fc.Engine, tiny_hf: Any, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    oracle.peft_adapter(tiny_hf("llama"), seed=1).save_pretrained(directory)
    change_weights(directory / "adapter_model.safetensors", damage)
    if damage == "no directory":
        shutil.rmtree(directory)
    elif damage == "no config":
        (directory / "adapter_config.json").unlink()
    with pytest.raises(fc.ModelLoadError, match="adapter") as raised:
        engine.load_adapter("b", directory)
    if damage in ("NaN", "one tensor missing"):
        assert "lora_" in str(raised.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_model(damage: str, tiny_dir: Any, make_engine: MakeEngine, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir("llama"), directory)
    change_weights(directory / "model.safetensors", damage)
    with pytest.raises(fc.ModelLoadError, match="safetensors" if damage != "one tensor missing" else "weight"):
        make_engine(directory)


def test_missing_shard(tiny_hf: Any, make_engine: MakeEngine, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_hf("qwen2").save_pretrained(directory, max_shard_size="100KB")
    sorted(directory.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(fc.ModelLoadError, match="model-00002"):
        make_engine(directory)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, fc.Unsupported, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"hidden_act": "relu"}, fc.Unsupported, "hidden_act.*relu"),
        ({"quantization_config": {"bits": 4}}, fc.Unsupported, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, fc.Unsupported, "rope_type.*longrope"),
        ({"num_key_value_heads": 3}, fc.ModelLoadError, "num_key_value_heads"),
        ({"hidden_size": None}, fc.ModelLoadError, "hidden_size"),
        ({"rope_theta": 1e-308}, fc.ModelLoadError, "rope_theta.*as float32"),
        ({"rms_norm_eps": 1e39}, fc.ModelLoadError, "rms_norm_eps.*as float32"),
        ({"intermediate_size": 100}, fc.ModelLoadError, "gate_proj|mlp"),
    ],
)
def test_model_configs(
    fields: dict[str, Any],
    error: type[Exception],
    message: str,
    tiny_dir: Any,
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_dir("llama"), directory)
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        make_engine(directory)


def test_no_model(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(fc.ModelLoadError, match=r"config\.json"):
        make_engine(tmp_path)
    with pytest.raises(fc.ModelLoadError, match=r"nowhere.*does not exist"):
        fc.Engine(tmp_path / "nowhere")
    for name in ("x" * 5000, "~nobody-of-this-name/x", "a\0b"):
        with pytest.raises(fc.ModelLoadError, match="model: "):
            fc.Engine(name)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(fc.ModelLoadError, match=r"broken\.gguf"):
        fc.Engine(tmp_path / "broken.gguf")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("device", "tpu", fc.InvalidArgument),
        ("device", "cuda:7", fc.Error),
        ("dtype", "int4", fc.InvalidArgument),
        ("max_model_len", 0, fc.InvalidArgument),
        ("max_num_seqs", -1, fc.InvalidArgument),
        ("max_num_batched_tokens", 0, fc.InvalidArgument),
        ("block_size", 0, fc.InvalidArgument),
        ("kv_cache_memory_bytes", 1, fc.InvalidArgument),
        ("num_threads", -1, fc.InvalidArgument),
        ("slo", fc.SLO(tpot_ms=0.0), fc.InvalidArgument),
    ],
)
def test_engine_settings(field: str, value: Any, error: type[Exception], make_engine: MakeEngine) -> None:
    with pytest.raises(error, match=field):
        make_engine(**{field: value})
