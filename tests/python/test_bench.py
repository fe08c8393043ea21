"""`flexcore bench`: every kind runs and counts what it says; how fast is nobody's business here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore import cli
from flexcore.bench import _floors, _measure, coserve
from flexcore.bench._sharing import Engines, Finetuning, Run
from flexcore.bench._simulated import Profile, Simulated
from flexcore.tiny import write_tiny_model

SMALL = ["--max-model-len", "128", "--max-num-seqs", "16", "--num-threads", "1", "--dtype", "float32"]


def bench(model: Path, tmp_path: Path, *words: str) -> Any:
    file = tmp_path / "result.json"
    assert cli.main(["bench", *words, "--model", str(model), "--json", str(file), *SMALL]) == 0
    return json.loads(file.read_text())


def test_kernels_without_the_program(numpy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    rows = bench(numpy_model, tmp_path, "kernels", "--quick")["kernels"]
    assert [row["name"].split("/")[0] for row in rows] == ["decode", "decode", "prefill", "finetune"]
    assert all(row["median_us"] > 0 and row["floor_us"] > 0 for row in rows)


def test_kernels_with_the_program(numpy_model: Path, tmp_path: Path) -> None:
    program = tmp_path / "flexcore_bench"
    program.write_text('#!/bin/sh\nwhile [ "$1" != --json ]; do shift; done\necho \'{"kernels": []}\' > "$2"\n')
    program.chmod(0o755)
    assert bench(numpy_model, tmp_path, "kernels", "--binary", str(program)) == {"kernels": []}
    assert cli.main(["bench", "kernels", "--binary", str(tmp_path / "absent")]) == 1


@pytest.mark.parametrize("swap_space", ["0", "1MB"])
def test_memory(swap_space: str, numpy_model: Path, tmp_path: Path) -> None:
    sizes = ["--sequence-length", "40", "--points", "4", "--train-steps", "1", "--lora-r", "4"]
    sizes += ["--swap-space-bytes", swap_space]
    result = bench(numpy_model, tmp_path, "memory", *sizes)
    rows = result["memory"]
    assert 3 <= len(rows) <= 4 <= result["choices"]
    for row in rows:  # what the ledger saw is what was planned
        assert row["measured_bytes"] == row["planned_bytes"] < result["unpruned_bytes"]
        assert row["tokens_per_s"] > 0 and len(row["step_seconds"]) == 2
    kept = [row["measured_bytes"] for row in rows]
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 3
    assert not rows[0]["recomputed"] and rows[0]["planned_host_bytes"] == 0
    if swap_space == "0":
        assert "gate" in rows[-1]["recomputed"] and rows[-1]["kept"] == ["hidden"] and not rows[-1]["offloaded"]
    else:
        assert rows[-1]["measured_bytes"] == 0 and "hidden" in rows[-1]["offloaded"]


def test_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_byte_tokenizer(write_tiny_model(tmp_path / "model", vocab_size=272))
    text, data = tmp_path / "text.jsonl", tmp_path / "data.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} green bottles on the wall"}) + "\n" for n in range(9)))
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f" {n}!"}) + "\n" for n in range(12)))
    sizes = ["--formats", "int8", "int4/16", "nf4/32", "--output-len", "3", "--window", "20", "--text-tokens", "100"]
    work = ["--text", str(text), "--data", str(data), "--train-steps", "4", "--held-out", "3", "--repeat", "1"]
    rows = bench(path, tmp_path, "quantization", *sizes, *work)["quantization"]
    assert [row["format"] for row in rows] == ["none", "int8", "int4/16", "nf4/32"]
    assert rows[0]["linears_ratio"] == 1 and rows[0]["perplexity_change"] == 0
    for row in rows:
        assert row["scored_tokens"] == rows[0]["scored_tokens"] > 80 and len(row["losses"]) == 4
        assert row["held_out_loss"] > 0 and row["final_loss"] > 0 and row["decode_ms"]["median"] > 0
    ratios = [row["linears_ratio"] for row in rows]
    assert ratios[0] > ratios[1] > ratios[2] >= ratios[3]
    # 4 bits are further away than 8.
    assert abs(rows[1]["perplexity_change"]) < abs(rows[2]["perplexity_change"])
    model = ["--model", str(path), *SMALL]
    assert cli.main(["bench", "quantization", "--formats", "int4/8", *model]) == 1
    assert "quantization_group_size: 8" in capsys.readouterr().err
    assert cli.main(["bench", "quantization", "--data", str(data), "--train-steps", "99", *model]) == 1
    assert "wanted 230" in capsys.readouterr().err


def test_the_plan_of_kernels(numpy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--plan", "--batch-size", "2", "--context-len", "9", "--num-tokens", "5", "--lora-r", "4"]
    result = bench(numpy_model, tmp_path, "kernels", *sizes)
    assert "linear gate, up" in capsys.readouterr().out
    shape, model = result["shape"], json.loads((numpy_model / "config.json").read_text())
    assert (shape["num_layers"], shape["wide"]) == (model["num_hidden_layers"], model["intermediate_size"])
    for step in result["steps"]:
        assert sum(kernel["launches"] for kernel in step["kernels"]) == step["launches"]
        assert sum(kernel["floor_us"] for kernel in step["kernels"]) == pytest.approx(step["floor_us"])
        assert step["eager_us"] == pytest.approx(step["floor_us"] + 2 * step["launches"])
    assert {row["step"].split(",")[0] for row in result["launches"]} > {"decode", "prefill", "backward"}


def test_the_plan_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "kernels", "--plan", "--json", "-"]
    assert cli.main(words) == 0
    slow = json.loads(capsys.readouterr().out)
    assert slow["shape"]["name"] == "llama-3.1-8b"
    assert cli.main([*words, "llama-3.1-8b", "--memory-tbps", "8.6"]) == 0
    fast = json.loads(capsys.readouterr().out)
    assert fast["launches"][0]["floor_us"] == pytest.approx(slow["launches"][0]["floor_us"] / 2, rel=1e-3)
    assert cli.main([*words, "no-such-model"]) == 1
    assert cli.main([*words, "--tflops", "0"]) == 1
    assert "--tflops: got 0.0" in capsys.readouterr().err


def test_latency_and_throughput(numpy_model: Path, tmp_path: Path) -> None:
    sizes = ["--input-len", "9", "--output-len", "3", "--batch-size", "2", "--num-iters", "1"]
    (row,) = bench(numpy_model, tmp_path, "latency", *sizes)["latency"]
    assert (row["batch_size"], row["input_len"], row["output_len"]) == (2, 9, 3)
    sizes = ["--num-prompts", "2", "--input-len", "9", "--output-len", "3", "--train-len", "12", "--train-steps", "2"]
    rows = {row["mode"]: row for row in bench(numpy_model, tmp_path, "throughput", *sizes)["throughput"]}
    assert rows["serve"]["trained_tokens_per_s"] == 0 and rows["serve"]["served_tokens_per_s"] > 0
    assert rows["finetune"]["trained_tokens_per_s"] * rows["finetune"]["seconds"] == pytest.approx(24)


def test_coserve(numpy_model: Path, tmp_path: Path) -> None:
    sizes = ["--seconds", "0.4", "--input-len", "4", "9", "--output-len", "3", "5", "--train-len", "16"]
    policies = ["hybrid", "temporal:4", "spatial", "separate"]
    sizes += ["--repeat", "2", "--burst", "2", "--figures", str(tmp_path / "figures" / "co")]
    result = bench(numpy_model, tmp_path, "coserve", *sizes, "--request-rate", "15", "30", "--policies", *policies)
    for name in ("rates", "steps", "burst"):
        assert (tmp_path / "figures" / f"co-{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (tmp_path / "figures" / f"co-{name}.svg").read_text()
    assert [run["policy"] for run in result["runs"]] == ["inference-only", *policies] * 2
    for run in result["runs"]:
        assert run["num_prompts"] == run["completed"] >= 1
        assert run["p99_tpot_ms"] >= run["median_tpot_ms"] > 0
        assert 0 <= run["attainment"] <= 1
        assert (run["finetune_tokens_per_s"] > 0) == (run["policy"] != "inference-only")
        assert (run["policy"] == "hybrid") == ("series" in run)
        assert 0 < len(run.get("series", {"end": [0]})["end"]) <= run["steps"]
    assert result["finetune_alone_tokens_per_s"] > 0 and len(result["finetune_alone_tokens_per_s_of_runs"]) == 4


def test_floors(numpy_model: Path) -> None:
    engine = fc.Engine(numpy_model, fc.EngineConfig(max_model_len=64, max_num_seqs=1))
    work = _floors.ModelWork(engine.model(), rank=4)
    engine.create_adapter("a", fc.LoraConfig(r=4))
    assert work.finetune_state_bytes() == 4 * engine.adapters()[0].bytes
    peaks = _floors.Peaks(1e9, 1e9, 1e9, 2e9, "made up")
    assert _floors.Work(3e9, 1e9).floor(peaks) == 3  # memory
    assert _floors.Work(1e9, 8e9).floor(peaks) == 4  # arithmetic
    assert _floors.Work(1e9, 8e9).floor(peaks, "float32") == 8
    assert peaks.best_of(_floors.Peaks(5e9, 0, 0, 0, "")).read_bytes_per_s == 5e9
    assert _measure.trained_tokens(engine) == 0


@pytest.mark.parametrize("policy", ["hybrid", "temporal:4"])
def test_the_simulator_is_near_a_real_run(policy: str, numpy_model: Path) -> None:
    """By the step times that the engine knows afterwards. On an idle machine they are within a tenth of each other."""
    config = fc.EngineConfig(device="cpu", max_model_len=128, max_num_seqs=16, num_threads=2, slo=fc.SLO(20, 500, 0.9))
    config.enable_prefix_caching = False
    engine = fc.Engine(numpy_model, config)
    finetuning = Finetuning(fc.LoraConfig(r=4), train_len=100, batch_size=2)
    arrivals = coserve.Traffic(2.0, (4, 40), (3, 20)).arrivals(20, 128)
    real = Engines(engine, config.slo, finetuning).run(policy, arrivals, 2.0)
    simulated = Simulated(Profile.of(engine, config), config.slo, finetuning).run(policy, arrivals, 2.0)

    def tokens(run: Run) -> list[int]:
        return [len(visit.times) for visit in run.visits]

    assert tokens(simulated) == tokens(real)
    ratio = simulated.finetune_tokens_per_s / real.finetune_tokens_per_s
    assert 1 / 1.8 < ratio < 1.8
    assert 1 / 1.8 < len(simulated.steps) / len(real.steps) < 1.8
