"""The memory table against what an engine then takes; engines side by side; the GIL."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
from engines import EXACT, MakeEngine, pool_of
from running import generate, greedy, is_idle, random_examples, random_tokens, run

import flexcore as fc

TARGETS: dict[str, Any] = {
    "all-linear": "all-linear",
    "q+v": ["q_proj", "v_proj"],
    "down": ["down_proj"],
    "top": ["layers.2.self_attn.o_proj"],
}


def planned(directory: Any, lora: fc.LoraConfig | None, length: int, **changes: Any) -> fc.MemoryPlan:
    return fc.plan(directory, fc.EngineConfig(**(EXACT | changes)), lora, length)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_against_the_ledger(name: str, targets: str, dtype: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    """A batch that fills what may be in flight takes just what was planned."""
    lora, length = fc.LoraConfig(r=5, target_modules=TARGETS[targets]), 100
    plan = planned(tiny_dir(name), lora, length, dtype=dtype)
    assert plan.tokens_in_flight == 8 * length
    engine = make_engine(name, dtype=dtype)
    engine.create_adapter("a", lora)
    job = engine.finetune("a", random_examples((length,) * 8, seed=1), fc.FinetuneConfig(num_epochs=2))
    engine.step()
    held = engine.memory()
    run(engine)
    assert engine.job(job).status == "succeeded"
    peak = engine.memory_peak()
    for tag in ("weights", "adapters", "gradients", "optimizer", "saved_activations"):
        assert peak[tag] == getattr(plan, tag), tag
    assert peak["kv_pages"] == pool_of(plan)
    assert 2 * held["adapters"] == plan.adapters and held["optimizer"] == plan.optimizer
    assert peak["workspace"] <= plan.workspace
    assert is_idle(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_threads": 1, "max_num_batched_tokens": 512, "max_num_seqs": 64},
        {"num_threads": 5, "max_num_batched_tokens": 37, "block_size": 5, "dtype": "bfloat16"},
        {"finetune_memory_bytes": 2_000_000, "max_num_seqs": 5},
    ],
)
@pytest.mark.parametrize("rank", [3, 256])
def test_nothing_takes_more_than_planned(
    rank: int, changes: dict[str, Any], make_engine: MakeEngine, tiny_dir: Any
) -> None:
    """Requests of every kind beside a job with more sequences than may be in flight."""
    lora = fc.LoraConfig(r=rank)
    plan = planned(tiny_dir("llama"), lora, 64, **changes)
    engine = make_engine(**changes)
    engine.create_adapter("a", lora)
    engine.finetune("a", random_examples((64,) * 20 + (9, 30), seed=1), fc.FinetuneConfig(batch_size=22))
    kinds = [{}, {"logprobs": 5}, {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 1.0}]
    for i in range(12):
        params = greedy(20, **kinds[i % 3])
        engine.submit(random_tokens(10 + 19 * i, seed=i), params, "a" if i % 2 else None)
    run(engine)
    engine.score(random_tokens(256, seed=3), "a")
    assert [job.status for job in engine.jobs()] == ["succeeded"]
    peak = engine.memory_peak()
    assert {tag for tag in peak if peak[tag] > getattr(plan, tag)} <= {"kv_pages"}
    assert peak["kv_pages"] == pool_of(plan)


def test_saved_by_the_token(tiny_dir: Any) -> None:
    lora = fc.LoraConfig(r=5)
    plans = [planned(tiny_dir("llama"), lora, length) for length in (1, 50, 100, 200)]
    assert [plan.tokens_in_flight for plan in plans] == [8, 400, 800, 1024]
    assert plans[2].saved_activations == pytest.approx(2 * plans[1].saved_activations, rel=0.02)
    for plan in plans[1:]:
        per_token = plan.saved_activations / plan.tokens_in_flight
        assert per_token <= 1.02 * (plan.num_layers + 1) * plan.saved_bytes_per_token_per_layer
    assert 0 < plans[0].saved_bytes_per_token_per_layer < plans[0].unpruned_bytes_per_token_per_layer


def test_what_is_kept(tiny_dir: Any) -> None:
    """Frozen linears keep nothing; norms, rotary and silu * up are rebuilt; fewer targets keep less."""
    plans = {
        name: planned(tiny_dir("llama"), fc.LoraConfig(r=5, target_modules=targets), 100)
        for name, targets in TARGETS.items()
    }
    for plan in plans.values():
        assert {tensor.choice for tensor in plan.tensors} <= {"kept", "rebuilt", "in kv_pages", "dropped"}
        assert all(tensor.name and tensor.reason and tensor.bytes_per_token > 0 for tensor in plan.tensors)
        kept = sum(tensor.bytes_per_token for tensor in plan.tensors if tensor.choice == "kept")
        assert kept == plan.saved_bytes_per_token_per_layer
        everything = sum(tensor.bytes_per_token for tensor in plan.tensors)
        assert everything == plan.unpruned_bytes_per_token_per_layer
        text = plan.describe()
        assert all(tensor.name in text and str(tensor.bytes_per_token) in text for tensor in plan.tensors)
    whole = {tensor.name: tensor.choice for tensor in plans["all-linear"].tensors}
    assert {"kept", "rebuilt", "in kv_pages", "dropped"} <= set(whole.values())
    for name in ("attention_norm", "mlp_norm", "mlp"):
        assert whole[name] == "rebuilt"
    # The way down to q and v of the first layer leads through all that others need, but no module's input is rebuilt.
    assert plans["q+v"].saved_activations <= plans["all-linear"].saved_activations
    assert [t.name for t in plans["q+v"].tensors if t.choice == "rebuilt"] == ["attention_norm"]
    assert plans["down"].saved_activations < plans["q+v"].saved_activations  # nothing of the first attention
    assert plans["top"].saved_activations < plans["down"].saved_activations  # nothing below its layer
    assert plans["top"].optimizer == plans["top"].adapters < plans["q+v"].optimizer


def test_without_finetuning(tiny_dir: Any, make_engine: MakeEngine) -> None:
    plan = planned(tiny_dir("llama"), None, 100)
    memory = make_engine("llama").memory()
    assert plan.weights == memory["weights"] and plan.kv_pages == memory["kv_pages"]
    assert plan.saved_activations == plan.adapters == plan.gradients == plan.optimizer == 0
    assert plan.total == plan.weights + plan.kv_pages + plan.workspace
    assert plan.tensors == []


def test_pages_as_asked(tiny_dir: Any, make_engine: MakeEngine) -> None:
    plan = planned(tiny_dir("llama"), None, 100, kv_cache_memory_bytes=500_000)
    assert 0 < plan.kv_pages <= 500_000
    assert make_engine(kv_cache_memory_bytes=500_000).memory()["kv_pages"] == plan.kv_pages


def test_default_length_fits_model_and_config(tiny_dir: Any) -> None:
    """The model's 256 positions; fewer if the engine is to take fewer."""
    assert fc.plan(tiny_dir("llama"), lora=fc.LoraConfig()).sequence_length == 256
    assert fc.plan(tiny_dir("llama"), fc.EngineConfig(max_model_len=128), fc.LoraConfig()).sequence_length == 128


def test_what_the_pool_cannot_hold(tiny_dir: Any, make_engine: MakeEngine) -> None:
    """Refused before anything is loaded, with the longest sequence that would fit: which does."""
    path, lora = tiny_dir("llama"), fc.LoraConfig(r=5)
    pool = planned(path, None, 100, kv_cache_memory_bytes=300_000).kv_pages
    with pytest.raises(fc.InvalidArgument, match=r"256 tokens keep at least \d+ bytes.*more than the pool") as info:
        planned(path, lora, 256, kv_cache_memory_bytes=300_000)
    longest = int(str(info.value).split("at most ")[1].split()[0])
    plan = planned(path, lora, longest, kv_cache_memory_bytes=300_000)
    assert plan.max_sequence_length == longest == plan.tokens_in_flight
    assert plan.total < planned(path, None, 100, kv_cache_memory_bytes=300_000).total + 4 * plan.adapters
    with pytest.raises(fc.InvalidArgument, match=f"at most {longest} tokens fit"):
        planned(path, lora, longest + 1, kv_cache_memory_bytes=300_000)
    engine = make_engine(kv_cache_memory_bytes=300_000)
    assert engine.memory()["kv_pages"] == pool == pool_of(plan)
    engine.create_adapter("a", lora)
    with pytest.raises(fc.InvalidArgument, match=f"{longest + 1} tokens keep at least"):
        engine.finetune("a", random_examples((longest + 1,), seed=1))
    job = engine.finetune("a", random_examples((longest, 20), seed=1), fc.FinetuneConfig(batch_size=2))
    run(engine)
    assert engine.job(job).status == "succeeded"


def test_bad_arguments(tiny_dir: Any) -> None:
    for length in (0, 257):
        with pytest.raises(fc.InvalidArgument, match="sequence_length"):
            planned(tiny_dir("llama"), None, length)
    with pytest.raises(fc.InvalidArgument, match="target_modules"):
        planned(tiny_dir("llama"), fc.LoraConfig(target_modules=["nothing"]), 100)
    for rank in (257, 2**61):
        with pytest.raises(fc.InvalidArgument, match=f"r: {rank}, wanted 1 to 256"):
            planned(tiny_dir("llama"), fc.LoraConfig(r=rank), 100)
    with pytest.raises(fc.ModelLoadError, match="does not exist"):
        fc.plan("/nowhere/at-all.gguf")


def test_two_engines(make_engine: MakeEngine) -> None:
    """Each in a thread of its own, on models of different shape: they share nothing."""
    prompts = [random_tokens(length, seed=length) for length in (5, 40, 17)]
    examples = random_examples((20, 30, 10), seed=1)

    def work(name: str, results: dict[str, Any]) -> None:
        engine = make_engine(name, block_size=5 if name == "llama" else 16)
        engine.create_adapter("a", fc.LoraConfig(r=4), seed=2)
        job = engine.finetune("a", examples, fc.FinetuneConfig(num_epochs=3, learning_rate=1e-2))
        ids = engine.submit_batch(prompts, greedy(30))
        log = run(engine)
        results[name] = ([log.tokens(request) for request in ids], log.losses(job))

    alone: dict[str, Any] = {}
    together: dict[str, Any] = {}
    for name in ("llama", "qwen3"):
        work(name, alone)
    threads = [threading.Thread(target=work, args=(name, together)) for name in ("llama", "qwen3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (tokens, losses) in alone.items():
        assert together[name][0] == tokens
        assert together[name][1] == pytest.approx(losses, rel=1e-4)


def test_one_engine_in_many_threads(shared_engine: MakeEngine) -> None:
    """Calls queue up: submissions come while another thread steps."""
    engine = shared_engine("llama")
    prompts = [random_tokens(10 + i, seed=i) for i in range(8)]
    wanted = generate(engine, prompts, greedy(10))
    ids: dict[int, int] = {}
    scores: list[Any] = []

    def submit(i: int) -> None:
        ids[i] = engine.submit(prompts[i], greedy(10))
        scores.append(engine.score(prompts[i]))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    tokens: dict[int, list[int]] = {}
    while any(thread.is_alive() for thread in threads) or engine.has_work():
        for event in engine.step().outputs:
            tokens.setdefault(event.request_id, []).append(event.token_id)
    assert [tokens[ids[i]] for i in range(8)] == wanted
    assert len(scores) == 8


def test_gil_is_released(shared_engine: MakeEngine) -> None:
    """Another thread goes on while a step runs: with switches by time as good as off, only a release lets it."""
    engine = shared_engine("llama")
    ticks, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(60.0)
    try:
        thread.start()
        engine.submit_batch([random_tokens(60, seed=i) for i in range(8)], greedy(20))
        advanced = 0
        while engine.has_work():
            before = ticks[0]
            engine.step()
            advanced += ticks[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert advanced > 0
    assert is_idle(engine)


def test_swap_space(make_engine: MakeEngine, tiny_dir: Any) -> None:
    plan = planned(tiny_dir("llama"), None, 100, swap_space_bytes=300_000)
    assert 0 < plan.swap_space <= 300_000
    assert make_engine(swap_space_bytes=300_000).memory()["swap_space"] == plan.swap_space
    assert plan.total == planned(tiny_dir("llama"), None, 100).total  # which is of the device
    assert planned(tiny_dir("llama"), None, 100, device="cpu").swap_space == 0
    with pytest.raises(fc.InvalidArgument, match="swap_space_bytes: -1, wanted >= 0"):
        planned(tiny_dir("llama"), None, 100, swap_space_bytes=-1)
