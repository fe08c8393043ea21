"""What fc.plan says of several devices; that the plans compute what they should is tested in tests/cpp/parallel."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engines import pool_of

import flexcore as fc
from flexcore import cli

LORA = fc.LoraConfig(r=4)
CONFIG: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64}
COLUMNS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
ROWS = {"o_proj", "down_proj"}


def planned(directory: Any, ranks: int, lora: Any = LORA, **options: Any) -> fc.MemoryPlan:
    return fc.plan(directory, fc.EngineConfig(**CONFIG), lora, 64, tensor_parallel_size=ranks, **options)


def parallel(directory: Any, ranks: int, **options: Any) -> fc.ParallelPlan:
    found = planned(directory, ranks, **options).parallel
    assert found is not None
    return found


def test_one_device_has_no_plan(tiny_dir: Any) -> None:
    assert planned(tiny_dir("llama"), 1).parallel is None
    assert fc.plan(tiny_dir("llama")).parallel is None


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_sites(name: str, tiny_dir: Any) -> None:
    """Megatron's states, hundreds of legal plans, and for split inputs a sum shared with the base."""
    plan = parallel(tiny_dir(name), 2)
    sites = {site.module: site for site in plan.sites}
    assert set(sites) == COLUMNS | ROWS
    for module in COLUMNS:
        assert (sites[module].weight, sites[module].x, sites[module].y) == ("|out", "=", "|k")
    for module in ROWS:
        site = sites[module]
        assert (site.weight, site.x, site.y) == ("|in", "|k", "+>=")
        assert site.plan == "x|k A|in u+ B= y+, back y= u= x|k"
        assert "y joins the linear's own sum before its all-reduce" in site.reason
        assert site.forward_bytes_per_token == site.backward_bytes_per_token == 0 < site.step_bytes
    for site in plan.sites:
        assert site.candidates > 100 and 1 <= len(site.kept) < site.candidates
        assert site.kept[0].plan == site.plan and 0 <= site.equal <= site.candidates - len(site.kept)
        assert all(kept.memory_bytes > 0 and kept.forward_us > 0 for kept in site.kept)


def test_memory_of_a_rank(tiny_dir: Any) -> None:
    whole = planned(tiny_dir("llama"), 2)
    plan = parallel(tiny_dir("llama"), 2)
    assert pool_of(plan) == pool_of(whole) // 2
    assert whole.weights / 2 < plan.weights < 0.6 * whole.weights  # the norms are copied
    assert whole.saved_activations / 2 < plan.saved_activations < whole.saved_activations
    assert whole.adapters / 2 <= plan.adapters < whole.adapters
    assert plan.optimizer == plan.adapters
    pools = ("weights", "kv_pages", "saved_activations", "adapters", "gradients", "optimizer")
    assert plan.total == sum(getattr(plan, name) for name in pools)
    split = parallel(tiny_dir("llama"), 2, sequence_parallel=True)
    assert split.saved_activations < plan.saved_activations and split.gradients < plan.gradients
    assert split.weights == plan.weights


def test_what_the_layers_send(tiny_dir: Any) -> None:
    """Two all-reduces a layer and direction, and the embedding's, of float32 hidden states by the ring."""
    config = json.loads((tiny_dir("llama") / "config.json").read_text())
    ring = 2 * (2 - 1) / 2 * 4 * config["hidden_size"]
    plan = parallel(tiny_dir("llama"), 2)
    assert plan.forward_bytes_per_token == (2 * config["num_hidden_layers"] + 1) * ring
    assert plan.backward_bytes_per_token == 2 * config["num_hidden_layers"] * ring
    split = parallel(tiny_dir("llama"), 2, sequence_parallel=True)
    assert split.forward_bytes_per_token == plan.forward_bytes_per_token - ring / 2  # after the last layer none gathers
    assert split.backward_bytes_per_token == plan.backward_bytes_per_token


def test_rates_decide(tiny_dir: Any) -> None:
    """Where collectives begin at once, every adapter matrix is split and u is moved."""
    rates = fc.ParallelRates(collective_seconds=0.0, memory_bytes_per_second=1e9, flops_per_second=1e9)
    eager = {site.module: site for site in parallel(tiny_dir("llama"), 2, rates=rates).sites}
    assert eager["down_proj"].plan == "x|k A|in u+>|k B|in y+, back y= u|k>= x|k"
    patient = {site.module: site for site in parallel(tiny_dir("llama"), 2).sites}
    assert eager["q_proj"].parameter_bytes < patient["q_proj"].parameter_bytes
    assert eager["q_proj"].forward_bytes_per_token > 0


def test_serving_only(tiny_dir: Any) -> None:
    plan = parallel(tiny_dir("llama"), 2, lora=None)
    assert plan.sites == [] and plan.adapters == plan.gradients == plan.saved_activations == 0 < plan.weights


def test_refused(tiny_dir: Any) -> None:
    for ranks in (0, -1, 1025):
        with pytest.raises(fc.InvalidArgument, match=f"tensor_parallel_size: {ranks}, wanted 1 to 1024"):
            planned(tiny_dir("llama"), ranks)
    with pytest.raises(
        fc.Unsupported, match=r"tensor_parallel_size: 7 does not divide the \d+ heads that model.layers.0"
    ):
        planned(tiny_dir("llama"), 7)
    with pytest.raises(fc.InvalidArgument, match="link_bytes_per_second: 0, wanted > 0"):
        planned(tiny_dir("llama"), 2, rates=fc.ParallelRates(link_bytes_per_second=0))
    with pytest.raises(fc.InvalidArgument, match="plan: tensor_parallel_size"):
        planned(tiny_dir("llama"), 2.5)  # type: ignore[arg-type]


def test_describe(tiny_dir: Any) -> None:
    text = str(planned(tiny_dir("llama"), 2))
    assert "2 ranks" in text and "x|k A|in u+ B= y+" in text


def test_command(tiny_dir: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    words = ["plan", str(tiny_dir("llama")), "--max-model-len", "128", "--tensor-parallel-size", "2"]
    assert cli.main([*words, "--explain"]) == 0
    shown = capsys.readouterr().out
    assert "memory of a rank, 2 ranks" in shown and "y joins the linear's own sum" in shown
    assert cli.main([*words, "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)["parallel"]
    assert values["tensor_parallel_size"] == 2 and len(values["sites"]) == 7
    assert values["sites"][0]["kept"][0]["plan"] == values["sites"][0]["plan"]


def test_other_methods(tiny_dir: Any) -> None:
    """(IA)^3 and bottleneck adapters are planned as LoRA is; what has no form between two tensors is refused."""
    for method in (fc.IA3Config(), fc.BottleneckConfig(4), fc.BottleneckConfig(4, use_parallel_adapter=True)):
        sites = {site.module: site for site in parallel(tiny_dir("llama"), 2, lora=method).sites}
        assert set(sites) == set(method.target_modules)
        for site in sites.values():
            assert site.candidates > 1 and site.plan and site.reason
    vectors = {site.module: site for site in parallel(tiny_dir("llama"), 2, lora=fc.IA3Config()).sites}
    assert vectors["k_proj"].plan.startswith("x|k l|")  # each rank has the vector's part of its heads
    assert vectors["k_proj"].forward_bytes_per_token == 0
    relu = parallel(tiny_dir("llama"), 2, lora=fc.BottleneckConfig(4, "relu")).sites[0]
    assert "act u2" in relu.plan and "u+ act" not in relu.plan  # no activation of a sum that is still to be taken
    for refused in (fc.LoraConfig(use_dora=True), fc.PromptTuningConfig(4), fc.PrefixTuningConfig(4)):
        with pytest.raises(fc.Unsupported, match="not DoRA or virtual tokens"):
            planned(tiny_dir("llama"), 2, lora=refused)
