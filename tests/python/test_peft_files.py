"""Adapters go to PEFT and come from it with the same logits; what flexcore cannot do, it refuses by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import MakeEngine
from running import random_examples, random_tokens, relative, run
from safetensors.numpy import load_file, save_file

import flexcore as fc

peft = pytest.importorskip("peft")
TOLERANCE = 1e-4
TOKENS = random_tokens(40, seed=1)
CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rslora": {"r": 6, "lora_alpha": 3, "use_rslora": True},
    "list": {"r": 3, "target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"]},
    "rank_pattern": {"r": 4, "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 64, r"layers\.0\.mlp\.down_proj": 1}},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.[02]\..*_proj": 3, "q_proj": 9},
        "alpha_pattern": {"q_proj": 5, "self_attn.k_proj": 40},
    },
}
FROM_PEFT = CONFIGS | {
    "regex": {"target_modules": r"model\.layers\.[12]\.(self_attn\.[qk]|mlp\.up)_proj"},
    "exclude": {"exclude_modules": ["layers.1.mlp.gate_proj", "o_proj"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 1}},
    "dropout": {"lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine) -> fc.Engine:
    return make_engine("qwen3")


@pytest.mark.parametrize("case", CONFIGS)
def test_into_peft(case: str, engine: fc.Engine, tiny_hf: Any, tmp_path: Path) -> None:
    """Made, trained and saved here; loaded by PEFT."""
    engine.create_adapter("a", fc.LoraConfig(**({"r": 4, "lora_alpha": 8} | CONFIGS[case])), seed=5)
    engine.finetune("a", random_examples((20, 30), seed=1), fc.FinetuneConfig(learning_rate=0.1, num_epochs=3))
    run(engine)
    ours = engine.logits(TOKENS, "a")
    engine.save_adapter("a", tmp_path)
    engine.unload_adapter("a")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    theirs = oracle.load_peft(tiny_hf("qwen3"), tmp_path)
    assert relative(ours, oracle.logits(theirs, TOKENS)) < TOLERANCE
    assert relative(ours, engine.logits(TOKENS)) > 0.01
    engine.load_adapter("b", tmp_path)  # and back again
    assert np.array_equal(engine.logits(TOKENS, "b"), ours)
    engine.unload_adapter("b")


@pytest.mark.parametrize("case", FROM_PEFT)
def test_from_peft(case: str, engine: fc.Engine, tiny_hf: Any, tmp_path: Path) -> None:
    """Made and saved by PEFT; loaded here, saved again, and loaded by PEFT."""
    model = oracle.peft_adapter(tiny_hf("qwen3"), seed=3, scale=0.2, **FROM_PEFT[case]).eval()
    model.save_pretrained(tmp_path / "theirs")
    wanted = oracle.logits(model, TOKENS)
    engine.load_adapter("a", tmp_path / "theirs")
    assert relative(engine.logits(TOKENS, "a"), wanted) < TOLERANCE
    info = engine.adapters()[0]
    modules = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert set(info.target_modules) == {name.rpartition(".")[2] for name in modules}
    assert info.rank == max(config.r for config in _ranks(model))
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert info.bytes == 4 * parameters == engine.memory()["adapters"]
    engine.save_adapter("a", tmp_path / "ours")
    engine.unload_adapter("a")
    again = oracle.load_peft(tiny_hf("qwen3"), tmp_path / "ours")
    assert relative(oracle.logits(again, TOKENS), wanted) < TOLERANCE


class _Rank:
    def __init__(self, r: int) -> None:
        self.r = r


def _ranks(model: Any) -> list[_Rank]:
    return [_Rank(p.shape[0]) for name, p in model.named_parameters() if "lora_A" in name]


def test_smollm2(smollm2_engine: fc.Engine, smollm2_hf: Any, tmp_path: Path) -> None:
    smollm2_engine.create_adapter("a", fc.LoraConfig(r=16, lora_alpha=32), seed=5)
    smollm2_engine.finetune("a", random_examples((20,), seed=1), fc.FinetuneConfig(learning_rate=1e-3))
    run(smollm2_engine)
    ours = smollm2_engine.logits(TOKENS, "a")
    smollm2_engine.save_adapter("a", tmp_path)
    smollm2_engine.unload_adapter("a")
    assert relative(ours, oracle.logits(oracle.load_peft(smollm2_hf, tmp_path), TOKENS)) < TOLERANCE


def test_saving_twice_replaces(engine: fc.Engine, tmp_path: Path) -> None:
    """The files of an adapter, not other files beside them."""
    (tmp_path / "README.md").write_text("mine")
    for seed in (1, 2):
        engine.create_adapter("a", fc.LoraConfig(r=seed), seed=seed)
        engine.save_adapter("a", tmp_path)
        engine.unload_adapter("a")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    engine.load_adapter("a", tmp_path)
    assert engine.adapters()[0].rank == 2
    engine.unload_adapter("a")


@pytest.fixture(scope="module")
def saved(tiny_hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    oracle.peft_adapter(tiny_hf("qwen3"), seed=3).save_pretrained(directory)
    return directory


def changed(saved: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(saved, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["norm"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.weight"]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "LOHA"),
        ("an_option_of_the_future", 3),
    ],
)
def test_refused_by_name(field: str, value: Any, saved: Path, engine: fc.Engine, tmp_path: Path) -> None:
    with pytest.raises(fc.Unsupported, match=field):
        engine.load_adapter("a", changed(saved, tmp_path / "a", **{field: value}))
    assert engine.adapters() == []


@pytest.mark.parametrize("place", ["embed_tokens", "lm_head"])
def test_tensors_of_two_kinds(place: str, engine: fc.Engine, tmp_path: Path) -> None:
    """An embedding's LoRA, or a whole module, beside a linear's LoRA."""
    own: dict[str, Any] = (
        {"target_modules": ["q_proj", place]} if place == "embed_tokens" else {"modules_to_save": [place]}
    )
    engine.create_adapter("a", fc.LoraConfig(r=2, **own))
    engine.save_adapter("a", tmp_path)
    engine.unload_adapter("a")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = next(name.rpartition(place)[0] for name in tensors if place in name) + place
    save_file(
        tensors | {f"{module}.lora_A.weight": np.ones((2, 8), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(fc.ModelLoadError, match=f"{place} has tensors of two kinds"):
        engine.load_adapter("a", tmp_path)
    assert engine.adapters() == []


def test_defaults_of_options_are_ignored(saved: Path, engine: fc.Engine, tmp_path: Path) -> None:
    """PEFT writes every option that it has; an older file has few."""
    config = json.loads((saved / "adapter_config.json").read_text())
    assert len(config) > 30
    engine.load_adapter("new", saved)
    old = {name: config[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}
    shutil.copytree(saved, tmp_path / "old")
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(old))
    engine.load_adapter("old", tmp_path / "old")
    assert np.array_equal(engine.logits(TOKENS, "old"), engine.logits(TOKENS, "new"))
    for name in ("old", "new"):
        engine.unload_adapter(name)
