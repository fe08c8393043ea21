"""A job's life: pause, resume, cancel, failure, checkpoints, and the versions that it publishes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import MakeEngine
from oracle import file_size_limit
from running import Log, generate, greedy, is_idle, random_examples, random_tokens, run

import flexcore as fc

EXAMPLES = random_examples((30, 5, 64, 17, 9, 41, 22, 2), seed=31)
PROMPT = random_tokens(11, seed=1)


def settings(**changes: Any) -> fc.FinetuneConfig:
    return fc.FinetuneConfig(**({"batch_size": 2, "learning_rate": 5e-2, "num_epochs": 3, "seed": 4} | changes))


def start(engine: fc.Engine, config: fc.FinetuneConfig | None = None, name: str = "a", seed: int = 1) -> int:
    engine.create_adapter(name, fc.LoraConfig(r=4, lora_alpha=16), seed=seed)
    return engine.finetune(name, EXAMPLES, config or settings())


def after(job: int, steps: int) -> Any:
    return lambda log: len(log.steps(job)) >= steps


@pytest.fixture(scope="module")
def losses(make_engine: MakeEngine) -> list[float]:
    """Of the job, without a break."""
    engine = make_engine()
    job = start(engine)
    return run(engine).losses(job)


@pytest.fixture
def engine(make_engine: MakeEngine) -> fc.Engine:
    return make_engine()


def test_pause_and_resume(engine: fc.Engine, losses: list[float]) -> None:
    job = start(engine)
    log = run(engine, until=after(job, 3))
    engine.step()  # in the middle of an optimizer step
    engine.pause_job(job)
    request = engine.submit(PROMPT, greedy(30))
    log = run(engine, log=log)
    assert len(log.tokens(request)) == 30
    assert engine.job(job).status == "paused" and not engine.has_work()
    assert len(log.steps(job)) <= 4 and log.finetune[job][-1].status == "paused"
    with pytest.raises(fc.InvalidArgument, match="paused"):
        engine.pause_job(job)
    engine.resume_job(job)
    done = len(log.steps(job))
    assert run(engine, log=log).losses(job)[done:] == pytest.approx(losses[done:], rel=1e-5)
    assert engine.job(job).status == "succeeded"


def test_cancel(engine: fc.Engine) -> None:
    job = start(engine)
    run(engine, until=after(job, 2))
    engine.step()
    engine.cancel_job(job)
    info = engine.job(job)
    assert info.status == "cancelled" and info.step >= 2
    assert is_idle(engine)  # at once
    log = run(engine)
    assert [event.status for event in log.finetune[job]] == ["cancelled"]
    assert not engine.adapters()[0].training
    for act in (engine.cancel_job, engine.pause_job, engine.resume_job):
        with pytest.raises(fc.InvalidArgument, match="cancelled"):
            act(job)
    assert engine.finetune("a", EXAMPLES, settings()) != job  # the adapter is free again
    run(engine)
    assert [info.status for info in engine.jobs()] == ["cancelled", "succeeded"]


def test_one_job_an_adapter(engine: fc.Engine) -> None:
    job = start(engine)
    with pytest.raises(fc.InvalidArgument, match=r'"a".*trained'):
        engine.finetune("a", EXAMPLES, settings())
    with pytest.raises(fc.InvalidArgument, match=r'"a".*trained'):
        engine.unload_adapter("a")
    assert engine.adapters()[0].training
    engine.cancel_job(job)


@pytest.mark.parametrize("config", [{}, {"optimizer": "sgd"}, {"lr_scheduler": "cosine", "warmup_ratio": 0.2}])
@pytest.mark.parametrize("steps", [0, 1, 5])  # the fifth is in the second epoch
def test_checkpoint(steps: int, config: dict[str, Any], make_engine: MakeEngine, tmp_path: Path) -> None:
    """Resumed in another engine, the losses are the same to the last bit."""
    first = make_engine()
    job = start(first, settings(**config))
    log = run(first, until=after(job, steps))
    first.save_checkpoint(job, tmp_path / "checkpoint")
    wanted = run(first, log=log).steps(job)

    second = make_engine()
    resumed = second.resume_finetune(tmp_path / "checkpoint", EXAMPLES)
    assert second.job(resumed).step == steps and second.job(resumed).adapter == "a"
    events = run(second).steps(resumed)
    assert [event.loss for event in events] == [event.loss for event in wanted[steps:]]
    assert [event.learning_rate for event in events] == [event.learning_rate for event in wanted[steps:]]
    assert [event.step for event in events] == [event.step for event in wanted[steps:]]
    assert second.job(resumed).trained_tokens == first.job(job).trained_tokens
    first.save_adapter("a", tmp_path / "first")
    second.save_adapter("a", tmp_path / "second")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_checkpoint_in_the_middle_of_a_step(engine: fc.Engine, tmp_path: Path) -> None:
    """Only whole optimizer steps are in it. It replaces the adapter that is loaded, and is an adapter itself."""
    config = settings(window_tokens=4, backward_window_tokens=4)
    whole = start(engine, config, name="whole")
    wanted = run(engine).losses(whole)
    job = start(engine, config)
    run(engine, until=after(job, 2))
    engine.step()
    assert engine.job(job).step == 2
    scores = engine.score(PROMPT, "a")
    engine.save_checkpoint(job, tmp_path / "c")
    run(engine, until=after(job, 2))
    engine.cancel_job(job)
    resumed = engine.resume_finetune(tmp_path / "c", EXAMPLES)
    assert np.array_equal(engine.score(PROMPT, "a"), scores)
    assert run(engine).losses(resumed) == pytest.approx(wanted[2:], rel=1e-5)
    engine.load_adapter("copy", tmp_path / "c")
    assert np.array_equal(engine.score(PROMPT, "copy"), scores)


def test_a_snapshot_is_the_job_as_it_was(engine: fc.Engine, tmp_path: Path) -> None:
    """Written after the job went on, and by another thread: what a checkpoint was at the time of the copy."""
    job = start(engine)
    log = run(engine, until=after(job, 2))
    engine.save_checkpoint(job, tmp_path / "wanted")
    snapshot, adapter_only = engine.snapshot_job(job), engine.snapshot_job(job, optimizer=False)
    wanted = run(engine, log=log).losses(job)
    ended = engine.snapshot_job(job)
    with ThreadPoolExecutor(1) as other:
        other.submit(snapshot.save_checkpoint, tmp_path / "got").result()
        other.submit(adapter_only.save_adapter, tmp_path / "adapter").result()
    for name in ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json"):
        assert (tmp_path / "got" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "wanted" / "adapter_model.safetensors").read_bytes()
    assert (snapshot.step, adapter_only.step, ended.step) == (2, 2, len(wanted))
    for without in (adapter_only, ended):
        with pytest.raises(fc.InvalidArgument, match=f"job {job}: its optimizer state is gone"):
            without.save_checkpoint(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    engine.save_adapter("a", tmp_path / "last")
    ended.save_adapter(tmp_path / "ended")
    last = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("last", "ended")]
    assert last[0] == last[1] != weights
    resumed = engine.resume_finetune(tmp_path / "got", EXAMPLES)
    assert run(engine).losses(resumed) == wanted[2:]


def test_a_snapshot_of_a_job_that_ended(engine: fc.Engine) -> None:
    """Is its own adapter's, or none: not that of another which has the name now."""
    job = start(engine, settings(num_epochs=1))
    run(engine)
    assert engine.snapshot_job(job).step == 4
    again = engine.finetune("a", EXAMPLES, settings(num_epochs=1))
    run(engine)
    assert engine.snapshot_job(again).step == 4
    engine.unload_adapter("a")
    engine.create_adapter("a", fc.LoraConfig(r=4), seed=2)
    for ended in (job, again):
        with pytest.raises(
            fc.InvalidArgument, match=f'job {ended} has ended, and "a" has been loaded or trained again'
        ):
            engine.snapshot_job(ended)


def test_checkpoint_of_other_examples(engine: fc.Engine, tmp_path: Path) -> None:
    job = start(engine)
    engine.save_checkpoint(job, tmp_path / "c")
    with pytest.raises(fc.InvalidArgument, match="trained by another job"):
        engine.resume_finetune(tmp_path / "c", EXAMPLES)
    engine.cancel_job(job)
    with pytest.raises(fc.InvalidArgument, match=r"examples: 3, wanted those of the first call \(8\)"):
        engine.resume_finetune(tmp_path / "c", EXAMPLES[:3])
    with pytest.raises(fc.InvalidArgument, match="optimizer state is gone"):
        engine.save_checkpoint(job, tmp_path / "c")


def test_a_checkpoint_that_cannot_go_on_changes_nothing(engine: fc.Engine, tmp_path: Path) -> None:
    job = start(engine)
    run(engine, until=after(job, 2))
    engine.save_checkpoint(job, tmp_path / "c")
    run(engine)
    before, scores = engine.adapters(), engine.score(PROMPT, "a")
    others = [fc.Example([500] * 4, [5] * 4)] * len(EXAMPLES)
    with pytest.raises(fc.InvalidArgument, match="unknown token id 500"):
        engine.resume_finetune(tmp_path / "c", others)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        kept = (tmp_path / "c" / name).read_bytes()
        (tmp_path / "c" / name).unlink()
        with pytest.raises(fc.ModelLoadError, match=name):
            engine.resume_finetune(tmp_path / "c", EXAMPLES)
        (tmp_path / "c" / name).write_bytes(kept)
    assert repr(engine.adapters()) == repr(before) and before[0].version == 12
    assert np.array_equal(engine.score(PROMPT, "a"), scores)
    assert is_idle(engine)
    engine.resume_finetune(tmp_path / "c", EXAMPLES)
    assert engine.adapters()[0].version == 2  # that of the checkpoint
    run(engine)
    assert engine.adapters()[0].version == 12
    assert np.array_equal(engine.score(PROMPT, "a"), scores)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -5),
        ("step", 12),
        ("step", 2**63 - 1),
        ("trained_tokens", -1),
        ("num_examples", 0),
        ("version", -1),
        ("config.batch_size", 0),
        ("config.num_epochs", 2**62),
    ],
)
def test_a_checkpoint_with_numbers_that_cannot_be(field: str, value: int, engine: fc.Engine, tmp_path: Path) -> None:
    job = start(engine)
    run(engine, until=after(job, 2))
    engine.save_checkpoint(job, tmp_path / "c")
    engine.cancel_job(job)
    path = tmp_path / "c" / "trainer_state.json"
    state = json.loads(path.read_text())
    *above, name = field.split(".")
    (state[above[0]] if above else state)[name] = value
    path.write_text(json.dumps(state))
    with pytest.raises(fc.ModelLoadError, match=rf"trainer_state\.json.*{name}: {value}, wanted"):
        engine.resume_finetune(tmp_path / "c", EXAMPLES)
    assert engine.adapters()[0].version == 2


def test_a_batch_larger_than_the_examples(engine: fc.Engine) -> None:
    """Is of all of them; what is dropped differs from step to step all the same."""
    engine.create_adapter("b", fc.LoraConfig(r=4, lora_dropout=0.5), seed=1)
    job = start(engine, settings(batch_size=2**63 - 1))
    log = run(engine)
    assert len(log.steps(job)) == 3 and engine.job(job).status == "succeeded"
    still = settings(batch_size=2**32, learning_rate=0.0, shuffle=False)
    engine.finetune("b", EXAMPLES, settings(num_epochs=1))  # B is zero before
    run(engine)
    job = engine.finetune("b", EXAMPLES, still)
    assert len(set(run(engine).losses(job))) == 3


def test_full_disk(engine: fc.Engine, tmp_path: Path) -> None:
    """A checkpoint that does not fit leaves nothing half-written, and an older one stays whole."""
    job = start(engine)
    run(engine, until=after(job, 1))
    for target in ("new", "old"):
        if target == "old":
            engine.save_checkpoint(job, tmp_path / "old")
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        run(engine, until=after(job, 1))
        with file_size_limit(4096), pytest.raises(fc.Error, match=target):
            engine.save_checkpoint(job, tmp_path / target)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with file_size_limit(4096), pytest.raises(fc.Error):
        engine.save_adapter("a", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    run(engine)
    assert engine.job(job).status == "succeeded"
    assert engine.resume_finetune(tmp_path / "old", EXAMPLES) != job


def test_versions_of_running_requests(engine: fc.Engine, make_engine: MakeEngine, tmp_path: Path) -> None:
    """A request finishes on the version that it began with; one that comes later gets the version of its time."""
    engine.create_adapter("a", fc.LoraConfig(r=4, lora_alpha=16), seed=1)
    job = engine.finetune("a", EXAMPLES, settings(num_epochs=1))
    run(engine)
    frozen = make_engine()
    job = engine.finetune("a", EXAMPLES, settings(num_epochs=4))
    log, started = Log(), {}
    for i in range(4):
        run(engine, until=lambda log, n=3 * i: len(log.steps(job)) >= n, log=log)
        engine.save_adapter("a", tmp_path / str(i))
        frozen.load_adapter(str(i), tmp_path / str(i))
        started[i] = engine.submit(PROMPT, greedy(60), "a")
    run(engine, log=log)
    wanted = generate(frozen, [PROMPT] * 4, greedy(60), [str(i) for i in range(4)])
    assert [log.tokens(started[i]) for i in range(4)] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == 4  # versions differ
    assert engine.adapters()[0].version == len(EXAMPLES) // 2 * 5
    sizes = engine.adapters()[0].bytes
    assert engine.memory()["adapters"] == sizes  # old versions went with their last request
    assert is_idle(engine)


def test_a_job_that_diverges_fails_alone(engine: fc.Engine, losses: list[float]) -> None:
    diverging = start(engine, settings(learning_rate=1e30, optimizer="sgd", max_grad_norm=0.0), name="b")
    job = start(engine)
    request = engine.submit(PROMPT, greedy(20))
    log = run(engine)
    info = engine.job(diverging)
    assert info.status == "failed" and "gradient norm" in info.error
    assert log.finetune[diverging][-1].status == "failed"
    assert len(log.tokens(request)) == 20
    assert log.losses(job) == pytest.approx(losses, rel=1e-4)
    assert is_idle(engine)


def test_parameters_that_are_not_finite_are_not_published(engine: fc.Engine) -> None:
    job = start(engine, settings(learning_rate=3e38))
    before = engine.score(PROMPT, "a")
    run(engine)
    info = engine.job(job)
    assert info.status == "failed" and info.step == 0 and "parameters are not finite" in info.error
    assert engine.adapters()[0].version == 0
    assert np.array_equal(engine.score(PROMPT, "a"), before)
    assert is_idle(engine)


def test_unknown_job(engine: fc.Engine) -> None:
    for act in (engine.job, engine.pause_job, engine.resume_job, engine.cancel_job):
        with pytest.raises(fc.InvalidArgument, match="unknown id 77"):
            act(77)
