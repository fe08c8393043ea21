"""Options become configurations, verbs print what they should, errors are one line."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore import cli, ui
from flexcore.cli import options
from flexcore.demo import stdlib
from flexcore.demo.traffic import Latencies, Visit, arrivals
from flexcore.outputs import CompletionOutput, RequestOutput
from flexcore.tiny import write_tiny_model


def parse(*words: str) -> argparse.Namespace:
    return cli.build_parser(words).parse_args(words)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main([verb, "--help"])
    assert info.value.code == 0
    assert verb in capsys.readouterr().out


def test_engine_options() -> None:
    text = "plan m --max-model-len 64 --kv-cache-memory-bytes 2MiB --dtype float32 --no-enable-prefix-caching"
    text += " --slo-tpot-ms 5 --slo-class batch=1000,60000"
    args = parse(*text.split())
    wanted = fc.EngineConfig(
        max_model_len=64,
        kv_cache_memory_bytes=2 << 20,
        dtype="float32",
        enable_prefix_caching=False,
        slo=fc.SLO(tpot_ms=5),
        slo_classes={"batch": fc.SLO(1000, 60000)},
    )
    assert options.engine_config(args) == wanted
    assert options.model_of(args) == "m"
    assert options.engine_config(parse("plan")) == fc.EngineConfig()


@pytest.mark.parametrize(("text", "count"), [("1000", 1000), ("2k", 2048), ("1.5GiB", 3 << 29), ("512 MB", 512 << 20)])
def test_byte_counts(text: str, count: int) -> None:
    assert options.byte_count(text) == count


def test_training_options() -> None:
    text = (
        "train d.jsonl --output-dir o --lora-rank 4 --lora-target-modules q_proj v_proj --use-rslora --batch-size 2 "
        "--gradient-accumulation-steps 3 --lr-scheduler-type cosine --num-train-epochs 2 --warmup-ratio 0.1 --seed 7"
    )
    args = parse(*text.split())
    lora = fc.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], use_rslora=True)
    assert options.adapter_of(args) == lora
    wanted = fc.FinetuneConfig(num_epochs=2, batch_size=6, lr_scheduler="cosine", warmup_ratio=0.1, seed=7)
    assert options.finetune_config(args) == wanted


@pytest.mark.parametrize(
    ("words", "targets"),
    [(["all-linear"], "all-linear"), (["q_proj"], ["q_proj"]), ([r".*(q|v)_proj"], r".*(q|v)_proj")],
)
def test_lora_targets(words: list[str], targets: str | list[str]) -> None:
    args = parse("plan", "--lora-target-modules", *words)
    assert options.adapter_of(args).target_modules == targets


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("--use-dora --lora-dropout 0.1", fc.LoraConfig(r=16, lora_alpha=32, use_dora=True, lora_dropout=0.1)),
        ("--peft-type ia3 --target-modules q_proj", fc.IA3Config(target_modules=["q_proj"])),
        ("--peft-type IA3 --feedforward-modules o_proj", fc.IA3Config(feedforward_modules=["o_proj"])),
        ("--peft-type bottleneck --bottleneck-size 8", fc.BottleneckConfig(8)),
        ("--peft-type prompt-tuning --num-virtual-tokens 5", fc.PromptTuningConfig(5)),
        ("--peft-type prefix_tuning", fc.PrefixTuningConfig(20)),
    ],
)
def test_other_methods(text: str, config: Any) -> None:
    assert options.adapter_of(parse("plan", *text.split())) == config


def test_options_of_other_methods() -> None:
    with pytest.raises(fc.InvalidArgument, match="--lora-r: got 4, but an adapter of the method IA3 has no r"):
        options.adapter_of(parse("plan", "--peft-type", "ia3", "--lora-r", "4"))
    with pytest.raises(SystemExit):
        parse("plan", "--peft-type", "loha")


def test_sampling_and_adapters() -> None:
    args = parse(
        "generate", "m", "-p", "a", "-p", "b", "--stop", "x", "--stop", "y", "--top-k", "5", "--lora-modules", "t=dir"
    )
    assert options.sampling_params(args) == fc.SamplingParams(max_tokens=128, temperature=0.0, stop=["x", "y"], top_k=5)
    assert options.adapters_of(args) == [("t", "dir")]
    with pytest.raises(fc.InvalidArgument, match="NAME=DIR"):
        options.adapters_of(parse("chat", "--lora-modules", "dir"))


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "/no/where"]) == 1
    assert capsys.readouterr().err == (
        "flexcore inspect: inspect: /no/where is no model directory, adapter directory or .gguf file\n"
    )
    with pytest.raises(SystemExit) as info:
        cli.main(["nonsense"])
    assert info.value.code == 2


def test_module_answers_cmake() -> None:
    command = [sys.executable, "-m", "flexcore", "--cmake-dir"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert out == str(Path(fc.__file__).parent / "lib/cmake/flexcore")


def test_importing_is_light() -> None:
    heavy = ("torch", "transformers", "tokenizers", "rich", "jinja2")
    code = f"import flexcore, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that can talk: the byte tokenizer's ids fit its vocabulary."""
    directory = write_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=272)
    return str(write_byte_tokenizer(directory))


ENGINE = ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4"]


def test_inspect_and_plan(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model, "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert cli.main(["plan", model]) == 0  # whose positions are fewer than the default length
    assert "256 tokens" in capsys.readouterr().out
    assert cli.main(["plan", model, "--explain", "--json", str(tmp_path / "p.json"), *ENGINE]) == 0
    assert "saved_activations" in capsys.readouterr().out
    plan = json.loads((tmp_path / "p.json").read_text())
    pools = ("weights", "kv_pages", "saved_activations", "adapters", "gradients", "optimizer", "workspace")
    assert plan["total"] == sum(plan[name] for name in pools) > 0


def test_generate_and_train(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", model, "-p", "hello", "--json", "-n", "2", "--max-tokens", "4", *ENGINE]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": "ab", "completion": "hello"}) + "\n" for _ in range(8)))
    out = tmp_path / "out"
    words = ["train", str(data), "--model", model, "--output-dir", str(out), "--batch-size", "2", "--save-steps", "2"]
    assert cli.main([*words, "--num-train-epochs", "2", "--learning-rate", "0.01", *ENGINE]) == 0
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"]
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "checkpoint").exists()  # nothing to resume
    assert (
        cli.main(["generate", model, "-p", "ab", "--lora-modules", f"tuned={out}", "--max-tokens", "6", *ENGINE]) == 0
    )


SAID = "# :smile: [bold]x[/] [/INST]\n\tif x:  pass" + " and so on" * 20


class Interrupted:
    """A `flexcore train` of 8 steps that Ctrl-C ends after step 3; the last checkpoint is that of the end."""

    def __init__(self, model: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = directory / "d.jsonl"
        data.write_text("".join(json.dumps({"prompt": "ab", "completion": "hello"}) + "\n" for _ in range(8)))
        self.out = directory / "out"
        self.words = ["train", str(data), "--model", model, "--output-dir", str(self.out), "--batch-size", "2", *ENGINE]
        self.words += ["--num-train-epochs", "2", "--lora-r", "4", "--lora-target-modules", "v_proj", "q_proj"]
        step = fc.LLM.step

        def interrupted(llm: fc.LLM) -> fc.StepReport:
            if any(job.step == 3 for job in llm.engine.jobs()):
                raise KeyboardInterrupt
            return step(llm)

        with monkeypatch.context() as patch:
            patch.setattr(fc.LLM, "step", interrupted)
            assert cli.main(self.words) == 130

    def logged(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.out / "training_log.jsonl").read_text().splitlines()]


def test_resume_goes_on(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Interrupted(model, tmp_path, monkeypatch)
    assert run.logged() == [1, 2, 3]
    with (run.out / "training_log.jsonl").open("a") as log:  # the run went on, and was killed in the middle of a line
        log.write('{"step": 4}\n{"step": 5}\n{"st')
    assert cli.main([*run.words, "--resume", "--lora-target-modules", "q_proj", "v_proj"]) == 0  # in any order
    assert run.logged() == list(range(1, 9))
    assert not (run.out / "checkpoint").exists()


def test_resume_refuses_other_options(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Interrupted(model, tmp_path, monkeypatch)
    capsys.readouterr()
    other = ["--num-train-epochs", "5", "--batch-size", "1", "--learning-rate", "1", "--no-shuffle", "--seed", "3"]
    other += ["--lora-r", "8", "--lora-target-modules", "all-linear", "--use-rslora", "--adapter-name", "x"]
    assert cli.main([*run.words, "--resume", *other]) == 1
    error = capsys.readouterr().err
    for difference in (
        "--num-train-epochs: got 5, the run has 2",
        "--per-device-train-batch-size: got 1, the run has 2",
        "--learning-rate: got 1.0, the run has 0.0002",
        "--shuffle: got False, the run has True",
        "--seed: got 3, the run has 0",
        "--lora-r: got 8, the run has 4",
        "--target-modules: got 'all-linear', the run has [",
        "--use-rslora: got True, the run has False",
        "--adapter-name: got 'x', the run has 'out'",
    ):
        assert difference in error
    assert run.logged() == [1, 2, 3]
    (run.out / "checkpoint" / "trainer_state.json").write_text("{")
    assert cli.main([*run.words, "--resume"]) == 1
    assert "trainer_state.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-samples", "--batch-size", "--gradient-accumulation-steps"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_are_positive(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("train", "d", "--output-dir", "o", option, value)
    assert f"got '{value}', wanted an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["65536", "-1", "x"])
def test_ports_exist(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", "m", "--port", value)
    assert f"got '{value}', wanted 0 to 65535" in capsys.readouterr().err


class Parrot:
    """Stands for an LLM that says SAID, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    def generate(self, prompts: list[str], *_: object) -> list[RequestOutput]:
        return [RequestOutput(prompt, [], [CompletionOutput(0, SAID)]) for prompt in prompts]

    def stream(self, messages: list[dict[str, str]], *_: object) -> Iterator[str]:
        self.asked.append(list(messages))
        yield from (SAID[:9], SAID[9:])


def test_answers_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parrot = Parrot()
    for verb in ("generate", "chat"):
        monkeypatch.setattr(cli.load_verb(verb), "load_llm", lambda *_: parrot)
    assert cli.main(["generate", "m", "-p", ":100: a", "-p", "b"]) == 0
    assert capsys.readouterr().out == f"> :100: a\n{SAID}\n\n> b\n{SAID}\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("/systemic\n/system be brief\nhi\n/system\nho\n"))
    assert cli.main(["chat", "m"]) == 0
    assert capsys.readouterr().out == f"{SAID}\n" * 3
    system, users = {"role": "system", "content": "be brief"}, [message[-1]["content"] for message in parrot.asked]
    assert users == ["/systemic", "hi", "ho"]
    assert [system in messages for messages in parrot.asked] == [False, True, False]


def test_inspect_shows_patterns_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": r".*\.[qv]_proj", "base_model_name_or_path": "a[/b]:100:"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert r".*\.[qv]_proj" in out
    assert "a[/b]:100:" in out


def test_terminal_drawings() -> None:
    assert ui.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert ui.sparkline([]) == ""
    assert ui.sparkline([2.0]) == "▁"
    lines = ui.chart([3.0, 2.0, 1.0], width=10, height=4)
    assert len(lines) == 4
    assert lines[0].startswith("3 ┤")
    assert lines[-1].startswith("1 ┤")
    assert len({len(line) for line in lines}) == 1
    assert [ui.format_bytes(count) for count in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert ui.percentile([1, 2, 3, 4], 50) == 2.5
    assert ui.format_duration(59.6) == "1:00 min"


def test_demo_parts() -> None:
    rows = stdlib.rows(40)
    assert rows == stdlib.rows(40)
    assert len({json.dumps(row) for row in rows}) == 40
    assert all(row["messages"][-1]["content"].endswith(".") for row in rows)
    stream = arrivals(10.0, ("a", "b"), seed=0)
    times = [when for when, _ in (next(stream) for _ in range(2000))]
    assert times == sorted(times)
    assert 180 < times[-1] < 220
    visit = Visit([], None, arrival=1.0)
    for now in (1.5, 1.6, 1.8):
        visit.note_token(now)
    assert (visit.ttft_ms, visit.tpot_ms) == (pytest.approx(500), pytest.approx(150))
    summary = Latencies.of([visit]).summary(fc.SLO(tpot_ms=100, ttft_ms=2000))
    assert summary["tpot_ms"]["within"] == 0.0
    assert summary["ttft_ms"]["within"] == 1.0
