"""Finetuning jobs against a plain PEFT + torch training loop, alone and beside others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
from engines import MakeEngine
from running import Log, generate, greedy, is_idle, random_examples, random_tokens, run

import flexcore as fc

torch = pytest.importorskip("torch")
TOLERANCE = 1e-3  # of a loss after up to ten optimizer steps
LENGTHS = (30, 5, 64, 17, 9, 41, 22, 2, 50, 13)
EXAMPLES = random_examples(LENGTHS * 2, seed=21)


def settings(**changes: Any) -> fc.FinetuneConfig:
    defaults = {"batch_size": 2, "learning_rate": 1e-2, "shuffle": False}
    return fc.FinetuneConfig(**(defaults | changes))


def batches(size: int, epochs: int = 1, examples: Sequence[fc.Example] = EXAMPLES) -> list[list[fc.Example]]:
    return [list(examples[i : i + size]) for i in range(0, len(examples), size)] * epochs


def create(engine: fc.Engine, name: str = "a", seed: int = 1, **config: Any) -> None:
    engine.create_adapter(name, fc.LoraConfig(**({"r": 4, "lora_alpha": 8} | config)), seed=seed)


def train(engine: fc.Engine, config: fc.FinetuneConfig, examples: Sequence[fc.Example] = EXAMPLES) -> list[float]:
    """The losses of a job that runs alone on a new adapter."""
    create(engine)
    job = engine.finetune("a", examples, config)
    losses = run(engine).losses(job)
    assert engine.job(job).status == "succeeded", engine.job(job).error
    engine.unload_adapter("a")
    assert is_idle(engine)
    return losses


def adamw(**options: Any) -> Any:
    defaults = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    return lambda parameters: torch.optim.AdamW(parameters, **(defaults | options))


CASES: dict[str, tuple[fc.FinetuneConfig, Any, float]] = {
    "adamw": (settings(num_epochs=5), adamw(), 1.0),
    "adamw-options": (
        settings(num_epochs=5, betas=(0.7, 0.95), eps=1e-4, weight_decay=0.3, max_grad_norm=0.0),
        adamw(betas=(0.7, 0.95), eps=1e-4, weight_decay=0.3),
        0.0,
    ),
    "sgd": (settings(num_epochs=5, optimizer="sgd", learning_rate=0.5), lambda p: torch.optim.SGD(p, lr=0.5), 1.0),
    "sgd-decay": (
        settings(num_epochs=5, optimizer="sgd", learning_rate=0.5, weight_decay=0.1, max_grad_norm=0.01),
        lambda p: torch.optim.SGD(p, lr=0.5, weight_decay=0.1),
        0.01,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_ten_steps(name: str, case: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine(name)
    config, optimizer, clip = CASES[case]
    create(engine)
    engine.save_adapter("a", tmp_path)
    job = engine.finetune("a", EXAMPLES[:4], config)
    steps = run(engine).steps(job)
    model = oracle.load_peft(tiny_hf(name), tmp_path, trainable=True)
    wanted = list(oracle.train(model, batches(2, 5, EXAMPLES[:4]), optimizer, clip))
    assert [event.loss for event in steps] == pytest.approx([loss for loss, _ in wanted], rel=TOLERANCE)
    assert [event.grad_norm for event in steps] == pytest.approx([norm for _, norm in wanted], rel=1e-2)
    assert [event.step for event in steps] == list(range(1, 11))
    assert clip == 0.01 or wanted[-2][0] < 0.95 * wanted[0][0]  # it learned something
    info = engine.job(job)
    assert (info.status, info.step, info.total_steps) == ("succeeded", 10, 10)
    assert info.trained_tokens == sum(LENGTHS[:4]) * 5
    tokens = random_tokens(20, seed=2)
    assert engine.logits(tokens, "a") == pytest.approx(oracle.logits(model, tokens), rel=0.02, abs=0.02)
    assert {a.name: a.version for a in engine.adapters()} == {"a": 10}
    engine.unload_adapter("a")
    assert is_idle(engine)


def test_eight_at_once_is_eight_accumulated(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """A step of eight examples is the torch loop that accumulates eight of one, normalised by the targets of all."""
    engine, examples = shared_engine("llama"), EXAMPLES[:8]
    create(engine)
    engine.save_adapter("a", tmp_path)
    job = engine.finetune("a", examples, settings(batch_size=8, num_epochs=3))
    steps = run(engine).steps(job)
    model = oracle.load_peft(tiny_hf("llama"), tmp_path, trainable=True)
    wanted = [loss for loss, _ in oracle.train(model, [examples] * 3, adamw())]
    assert [event.loss for event in steps] == pytest.approx(wanted, rel=1e-4)
    targets = sum(sum(label != -100 for label in example.labels[1:]) for example in examples)
    assert [event.target_tokens for event in steps] == [targets] * 3


def test_last_batch_may_be_smaller(shared_engine: MakeEngine) -> None:
    engine = shared_engine("llama")
    create(engine)
    job = engine.finetune("a", EXAMPLES[:7], settings(batch_size=3, num_epochs=2))
    assert engine.job(job).total_steps == 6
    counts = [event.target_tokens for event in run(engine).steps(job)]
    wanted = [sum(sum(x != -100 for x in e.labels[1:]) for e in b) for b in batches(3, 2, EXAMPLES[:7])]
    assert counts == wanted


def test_shuffle_is_a_permutation_of_the_seed(shared_engine: MakeEngine) -> None:
    engine = shared_engine("llama")
    still = {"batch_size": 1, "learning_rate": 0.0, "num_epochs": 2}
    plain = train(engine, settings(**still))
    shuffled = train(engine, settings(shuffle=True, seed=5, **still))
    assert shuffled == pytest.approx(train(engine, settings(shuffle=True, seed=5, **still)), rel=1e-6)
    assert shuffled != train(engine, settings(shuffle=True, seed=6, **still))
    for epoch in (shuffled[:20], shuffled[20:]):
        assert epoch != plain[:20]
        assert sorted(epoch) == pytest.approx(sorted(plain[:20]), rel=1e-6)
    assert shuffled[:20] != shuffled[20:]


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.31])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules(name: str, warmup: float, shared_engine: MakeEngine) -> None:
    import math

    import transformers

    engine = shared_engine("llama")
    create(engine, target_modules=["q_proj"])
    config = settings(batch_size=1, num_epochs=2, lr_scheduler=name, warmup_ratio=warmup, learning_rate=3e-3)
    job = engine.finetune("a", EXAMPLES[:8], config)
    rates = [event.learning_rate for event in run(engine).steps(job)]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    full_name = "constant_with_warmup" if name == "constant" else name
    scheduler = transformers.get_scheduler(full_name, optimizer, math.ceil(16 * warmup), 16)
    wanted = []
    for _ in range(16):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_windows_change_nothing(shared_engine: MakeEngine) -> None:
    engine, examples = shared_engine("mistral"), EXAMPLES[:6]
    wanted = train(engine, settings(), examples)
    for forward, backward in ((1, 1), (7, None), (None, 5), (16, 64), (64, 16)):
        config = settings(window_tokens=forward, backward_window_tokens=backward)
        assert train(engine, config, examples) == pytest.approx(wanted, rel=1e-4)


def test_two_jobs_at_once(shared_engine: MakeEngine) -> None:
    """Different targets, ranks, batch sizes and weights; each has the losses that it has alone."""
    engine = shared_engine("llama")
    configs = {"a": settings(weight=3.0), "b": settings(batch_size=3, num_epochs=2, optimizer="sgd", learning_rate=0.3)}
    loras: dict[str, Any] = {"a": {}, "b": {"r": 7, "target_modules": ["v_proj", "down_proj"]}}
    data = {"a": EXAMPLES[:8], "b": EXAMPLES[8:14]}

    def losses(together: bool) -> dict[str, list[float]]:
        jobs, log = {}, Log()
        for name in configs:
            create(engine, name, **loras[name])
            jobs[name] = engine.finetune(name, data[name], configs[name])
            if not together:
                run(engine, log=log)
        run(engine, log=log)
        for name in configs:
            engine.unload_adapter(name)
        assert is_idle(engine)
        return {name: log.losses(job) for name, job in jobs.items()}

    alone, together = losses(False), losses(True)
    for name in configs:
        assert len(alone[name]) == 4
        assert together[name] == pytest.approx(alone[name], rel=1e-4)


def test_beside_requests(shared_engine: MakeEngine) -> None:
    """Training has the same losses beside requests, and requests the same tokens beside training."""
    engine = shared_engine("llama3")
    prompts = [random_tokens(length, seed=length) for length in (3, 30, 90, 12, 45, 8)]
    sampling = [greedy(40) if i % 2 else fc.SamplingParams(max_tokens=40, seed=i, ignore_eos=True) for i in range(6)]
    create(engine, "other", seed=9)
    names = [None, "other", None, "other", None, None]
    wanted_tokens = generate(engine, prompts, sampling, names)
    wanted_losses = train(engine, settings(num_epochs=2), EXAMPLES[:10])

    create(engine)
    job = engine.finetune("a", EXAMPLES[:10], settings(num_epochs=2))
    log, ids = Log(), []
    for i in range(6):  # they come while it trains
        run(engine, until=lambda log, at=3 * i: len(log.reports) >= at, log=log)
        ids.append(engine.submit(prompts[i], sampling[i], names[i]))
    run(engine, log=log)
    assert [log.tokens(request) for request in ids] == wanted_tokens
    assert log.losses(job) == pytest.approx(wanted_losses, rel=1e-4)
    both = [r for r in log.reports if r.num_decode_tokens and r.num_finetune_forward_tokens]
    assert both  # in the same iterations
    assert sum(r.num_finetune_forward_tokens for r in log.reports) == 2 * sum(LENGTHS)
    for name in ("a", "other"):
        engine.unload_adapter(name)
    assert is_idle(engine)


def test_log_probabilities_equal_score(shared_engine: MakeEngine, tmp_path: Path) -> None:
    """The loss in training is minus the mean log-probability that serving gives the same tokens."""
    engine = shared_engine("qwen2")
    create(engine)
    engine.finetune("a", EXAMPLES[:6], settings(num_epochs=3, learning_rate=0.05))
    run(engine)
    for example in EXAMPLES[:4]:
        job = engine.finetune("a", [example], settings(learning_rate=0.0))
        scores = engine.score(example.input_ids, "a")
        targets = [i for i, label in enumerate(example.labels[1:]) if label != -100]
        assert run(engine).losses(job) == pytest.approx([-float(scores[targets].mean())], rel=1e-5)


def test_smollm2_learns(smollm2_engine: fc.Engine, smollm2_hf: Any, tmp_path: Path) -> None:
    """Three steps on the real model, with PEFT's losses."""
    engine = smollm2_engine
    create(engine)
    engine.save_adapter("a", tmp_path)
    examples = random_examples((20, 31), seed=3, masked=False)
    job = engine.finetune("a", examples, settings(num_epochs=3, learning_rate=2e-3))
    losses = run(engine).losses(job)
    model = oracle.load_peft(smollm2_hf, tmp_path, trainable=True)
    wanted = [loss for loss, _ in oracle.train(model, [examples] * 3, adamw(lr=2e-3))]
    assert losses == pytest.approx(wanted, rel=TOLERANCE)
    assert losses[2] < losses[0]
