"""DoRA, (IA)^3, bottleneck adapters and dropout, against PEFT and torch: logits, files, gradients, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from engines import MODELS, MakeEngine
from running import generate, greedy, is_idle, random_examples, random_tokens, relative, run
from test_gradients import LENGTHS, SPLIT_TOLERANCE, TOLERANCE, assert_close
from test_recompute import budgets

import flexcore as fc

TOKENS = random_tokens(40, seed=1)
# name -> what makes PEFT's adapter.
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("dora", {}),
    "dora-attention": ("dora", {"target_modules": ["q_proj", "o_proj"], "r": 3, "use_rslora": True}),
    "dora-down": ("dora", {"target_modules": ["down_proj"]}),
    "ia3": ("ia3", {}),
    "ia3-outputs": ("ia3", {"target_modules": list(oracle.SITES), "feedforward_modules": []}),
    "ia3-inputs": ("ia3", {"target_modules": ["o_proj", "down_proj"], "feedforward_modules": ["o_proj", "down_proj"]}),
}
BOTTLENECK: dict[str, fc.BottleneckConfig] = {
    "series": fc.BottleneckConfig(bottleneck_size=6, non_linearity="relu", scaling=0.75),
    "series-all": fc.BottleneckConfig(5, "gelu", target_modules=list(oracle.SITES)),
    "parallel": fc.BottleneckConfig(7, "tanh", 0.5, use_parallel_adapter=True, target_modules=list(oracle.SITES)),
    "parallel-down": fc.BottleneckConfig(4, "silu", use_parallel_adapter=True, target_modules=["down_proj"]),
}
ALL = [*PEFT, *BOTTLENECK]


def saved(case: str, hf: Any, directory: Path, seed: int = 3) -> Any:
    """The torch model, and its files in the directory."""
    if case in BOTTLENECK:
        model = oracle.bottleneck_adapter(hf, BOTTLENECK[case], seed)
        oracle.save_bottleneck(model, BOTTLENECK[case], directory)
    else:
        method, fields = PEFT[case]
        model = oracle.method_adapter(hf, method, seed, **fields)
        model.save_pretrained(directory)
    return model.eval()


def gradients(model: Any, examples: list[fc.Example]) -> dict[str, Any]:
    """Under the names of the files."""
    result = oracle.gradients(model, examples)
    return {_key(name): value for name, value in result.items()}


def _key(name: str) -> str:
    if name == "loss" or name.startswith("base_model."):
        return name.replace(".ia3_l.default", ".ia3_l").replace("magnitude_vector.weight", "magnitude_vector")
    return f"base_model.model.{name}"


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("name", MODELS)
def test_against_autograd(case: str, name: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine(name)
    model = saved(case, tiny_hf(name), tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    assert relative(engine.logits(TOKENS, "a"), oracle.logits(model, TOKENS)) < TOLERANCE
    assert relative(engine.logits(TOKENS, "a"), engine.logits(TOKENS)) > 1e-3
    examples = random_examples(LENGTHS, seed=7)
    assert_close(engine.loss_and_gradients("a", examples), gradients(model, examples), TOLERANCE)
    assert is_idle(engine)


@pytest.mark.parametrize("case", ALL)
def test_splits_and_budgets(case: str, make_engine: MakeEngine, tiny_hf: Any, tiny_dir: Any, tmp_path: Path) -> None:
    """No split into windows, and nothing that is recomputed, changes the gradients."""
    engine = make_engine("qwen2", max_num_batched_tokens=128, max_num_seqs=1)
    saved(case, tiny_hf("qwen2"), tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    examples = random_examples((70, 23), seed=9)
    wanted = engine.loss_and_gradients("a", examples)
    assert all(np.linalg.norm(value) > 0 for key, value in wanted.items() if key != "loss")
    for split in ((1, 1), (1, None), (None, 1), (9, 17), (33, 7)):
        assert_close(engine.loss_and_gradients("a", examples, *split), wanted, SPLIT_TOLERANCE)
    choices = budgets(tiny_dir("qwen2"), config_of(case), 70)
    assert len(choices) >= 2
    for budget, _ in choices[:: max(1, len(choices) // 4)] + choices[-1:]:
        engine.set_finetune_memory(budget)
        assert_close(engine.loss_and_gradients("a", examples, 9, 17), wanted, SPLIT_TOLERANCE)


def config_of(case: str) -> Any:
    if case in BOTTLENECK:
        return BOTTLENECK[case]
    method, fields = PEFT[case]
    return fc.IA3Config(**fields) if method == "ia3" else fc.LoraConfig(**({"use_dora": True, "r": 4} | fields))


@pytest.mark.parametrize("case", PEFT)
def test_into_peft(case: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Made, trained and saved here; loaded by PEFT, and by flexcore again."""
    engine = shared_engine("qwen2")
    engine.create_adapter("a", config_of(case), seed=5)
    before = engine.logits(TOKENS, "a")
    assert relative(before, engine.logits(TOKENS)) < 1e-6  # a new adapter changes nothing
    engine.finetune("a", random_examples((20, 30), seed=1), fc.FinetuneConfig(learning_rate=0.05, num_epochs=3))
    run(engine)
    ours = engine.logits(TOKENS, "a")
    assert relative(ours, before) > 1e-3
    engine.save_adapter("a", tmp_path)
    theirs = oracle.load_peft(tiny_hf("qwen2"), tmp_path)
    assert relative(ours, oracle.logits(theirs, TOKENS)) < TOLERANCE
    engine.load_adapter("b", tmp_path)
    assert np.array_equal(engine.logits(TOKENS, "b"), ours)
    kinds = {info.name: info.peft_type for info in engine.adapters()}
    assert kinds == dict.fromkeys(("a", "b"), "IA3" if case.startswith("ia3") else "LORA")


@pytest.mark.parametrize("case", BOTTLENECK)
def test_bottleneck_files(case: str, shared_engine: MakeEngine, tmp_path: Path) -> None:
    engine = shared_engine("llama")
    engine.create_adapter("a", BOTTLENECK[case], seed=5)
    assert relative(engine.logits(TOKENS, "a"), engine.logits(TOKENS)) < 1e-6
    engine.finetune("a", random_examples((20, 30), seed=1), fc.FinetuneConfig(learning_rate=0.05, num_epochs=3))
    run(engine)
    engine.save_adapter("a", tmp_path)
    engine.load_adapter("b", tmp_path)
    assert np.array_equal(engine.logits(TOKENS, "b"), engine.logits(TOKENS, "a"))
    assert relative(engine.logits(TOKENS, "a"), engine.logits(TOKENS)) > 1e-3
    assert {info.peft_type for info in engine.adapters()} == {"BOTTLENECK"}


def trains_alike(engine: fc.Engine, model: Any, rate: float) -> None:
    """Adapter "a" of the engine, and the same one in torch, with AdamW."""
    examples = random_examples((33, 21, 40, 12), seed=4)
    config = fc.FinetuneConfig(learning_rate=rate, num_epochs=3, batch_size=2, shuffle=False)
    job = engine.finetune("a", examples, config)
    ours = run(engine).losses(job)
    batches = [examples[:2], examples[2:]] * 3
    theirs = oracle.train(model, batches, lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0))
    assert ours == pytest.approx([loss for loss, _ in theirs], rel=1e-3)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("case", ["dora", "ia3", "series-all"])
def test_training(case: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """The losses of AdamW, step by step. DoRA's norms follow its parameters."""
    engine = shared_engine("llama3")
    model = saved(case, tiny_hf("llama3"), tmp_path / "a")
    for parameter in model.parameters():  # as loaded
        parameter.grad = None
    engine.load_adapter("a", tmp_path / "a")
    trains_alike(engine, model, rate=0.02)


def test_side_by_side(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Adapters of all methods in one batch, and none: each request's tokens are those it gets alone."""
    engine = shared_engine("llama")
    names: list[str | None] = [None]
    for case in ALL:
        saved(case, tiny_hf("llama"), tmp_path / case, seed=len(names))
        engine.load_adapter(case, tmp_path / case)
        names.append(case)
    engine.create_adapter("lora", fc.LoraConfig(r=4), seed=1)
    engine.finetune("lora", random_examples((20,), seed=1), fc.FinetuneConfig(learning_rate=0.1, num_epochs=2))
    run(engine)
    names.append("lora")
    prompts = [random_tokens(9 + i, seed=i) for i in range(len(names))]
    alone = [generate(engine, [prompt], greedy(12), name)[0] for prompt, name in zip(prompts, names, strict=True)]
    assert generate(engine, prompts, greedy(12), names) == alone
    scores = [engine.score(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    base = engine.score(prompts[0])
    assert np.array_equal(scores[0], base)


@pytest.mark.parametrize("split", [(None, None), (7, 19), (1, 1)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("name", "dora"), [("llama", False), ("llama", True), ("qwen2", True)])
def test_dropout(
    name: str, dora: bool, p: float, split: Any, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path
) -> None:
    """Masks are functions of position, feature, linear and sequence: PEFT with the same ones has the same gradients."""
    engine = shared_engine(name)
    make = (lambda hf, **fields: oracle.method_adapter(hf, "dora", **fields)) if dora else oracle.peft_adapter
    model = make(tiny_hf(name), seed=3, lora_dropout=p)
    model.save_pretrained(tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    masks = oracle.mask_dropouts(model.train(), p, seed=12345678901)
    examples = random_examples((37, 70), seed=7)
    total = sum(sum(label != -100 for label in example.labels[1:]) for example in examples)
    wanted: dict[str, Any] = {"loss": 0.0}
    for i, example in enumerate(examples):
        for mask in masks:
            mask.sequence = i
        for key, value in gradients(model, [example]).items():
            share = sum(label != -100 for label in example.labels[1:]) / total
            wanted[key] = wanted.get(key, 0.0) + share * value
    got = engine.loss_and_gradients("a", examples, *split, dropout_seed=12345678901)
    assert_close(got, wanted, TOLERANCE)
    plain = engine.loss_and_gradients("a", examples, *split)
    assert abs(plain["loss"] - got["loss"]) > 1e-6


def test_dropout_in_splits_and_budgets(make_engine: MakeEngine, tiny_dir: Any) -> None:
    """No split into windows, and nothing that is recomputed, changes what is dropped."""
    engine = make_engine("qwen2", max_num_batched_tokens=128, max_num_seqs=1)
    config = fc.LoraConfig(r=4, use_dora=True, lora_dropout=0.3)
    engine.create_adapter("a", config, seed=5)
    examples = random_examples((70, 23), seed=9)
    engine.finetune("a", examples, fc.FinetuneConfig(learning_rate=0.05))  # B is zero before
    run(engine)
    wanted = engine.loss_and_gradients("a", examples, dropout_seed=7)
    assert all(np.linalg.norm(value) > 0 for key, value in wanted.items() if key != "loss")
    choices = budgets(tiny_dir("qwen2"), config, 70)
    assert len(choices) >= 2
    for budget, _ in choices[:: max(1, len(choices) // 4)] + choices[-1:]:
        engine.set_finetune_memory(budget)
        assert_close(engine.loss_and_gradients("a", examples, 9, 17, dropout_seed=7), wanted, SPLIT_TOLERANCE)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_trains_and_serves(dora: bool, shared_engine: MakeEngine) -> None:
    """In training every step drops others, the same for the same seed; serving drops nothing."""
    engine = shared_engine("qwen2")
    losses = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        engine.create_adapter(name, fc.LoraConfig(r=4, lora_dropout=0.3, use_dora=dora), seed=5)
        config = fc.FinetuneConfig(learning_rate=0.05, num_epochs=4, seed=seed, shuffle=False)
        job = engine.finetune(name, random_examples((20, 30), seed=1), config)
        losses.append(run(engine).losses(job))
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(losses[2][0], rel=1e-6)  # B is zero in the first step
    assert losses[0] != losses[2]
    assert np.array_equal(engine.logits(TOKENS, "a"), engine.logits(TOKENS, "b"))


def test_dropout_beside_another_linear(shared_engine: MakeEngine) -> None:
    """Elements are dropped at one linear alone, while another adapter serves at its neighbour."""
    engine = shared_engine("llama")
    engine.create_adapter("trains", fc.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3), seed=5)
    engine.create_adapter("serves", fc.LoraConfig(r=3, target_modules=["v_proj"]), seed=6)
    engine.finetune("serves", random_examples((20,), seed=1), fc.FinetuneConfig(learning_rate=0.1))
    run(engine)
    config = fc.FinetuneConfig(learning_rate=0.05, num_epochs=8)
    alone = generate(engine, [TOKENS[:9]], greedy(12), "serves")
    job = engine.finetune("trains", random_examples((20, 30), seed=2), config)
    assert generate(engine, [TOKENS[:9]], greedy(12), "serves") == alone
    run(engine)
    assert engine.job(job).status == "succeeded"


def any_method(rng: np.random.Generator) -> Any:
    """A small adapter of a random method at random linears."""
    some = [str(site) for site in rng.choice(oracle.SITES, size=rng.integers(1, 5), replace=False)]
    method = rng.choice(["lora", "lora", "dora", "ends", "ia3", "bottleneck", "prompt", "prefix"])
    rank, dropout = int(rng.integers(1, 9)), float(rng.choice([0.0, 0.3]))
    if method == "ends":  # of the model
        own = [str(name) for name in rng.choice(["embed_tokens", "lm_head"], size=rng.integers(0, 2), replace=False)]
        ends = [name for name in ("embed_tokens", "lm_head") if name not in own]
        return fc.LoraConfig(r=rank, target_modules=[*some, *ends], lora_dropout=dropout, modules_to_save=own)
    if method == "ia3":
        return fc.IA3Config(some, [site for site in some if site in ("o_proj", "down_proj")])
    if method == "bottleneck":
        return fc.BottleneckConfig(rank, use_parallel_adapter=bool(rng.integers(2)), target_modules=some)
    if method in ("prompt", "prefix"):
        return {"prompt": fc.PromptTuningConfig, "prefix": fc.PrefixTuningConfig}[method](rank)
    return fc.LoraConfig(r=rank, target_modules=some, lora_dropout=dropout, use_dora=bool(method == "dora"))


@pytest.mark.parametrize("seed", range(12))
def test_any_together(seed: int, make_engine: MakeEngine) -> None:
    """Jobs and requests of random methods in the same steps: each has the losses and tokens that it has alone."""
    rng = np.random.default_rng(seed)
    quantized = (
        {"quantization": ("int8", "int4", "nf4")[seed % 3], "quantization_group_size": 16} if seed % 4 == 0 else {}
    )
    engine = make_engine("llama" if seed % 2 else "qwen2", max_num_batched_tokens=48, **quantized)
    trained = [any_method(rng) for _ in range(3)]
    served = [any_method(rng) for _ in range(3)]
    examples = random_examples((31, 17), seed=seed)
    config = fc.FinetuneConfig(learning_rate=0.02, num_epochs=2, batch_size=1)

    def start(name: str, adapter: Any, index: int) -> int:
        engine.create_adapter(name, adapter, seed=index)
        return engine.finetune(name, examples, config)

    losses = []
    for i, adapter in enumerate(trained):
        job = start(f"alone-{i}", adapter, i)
        losses.append(run(engine).losses(job))
    names = [f"served-{i}" for i in range(len(served))]
    for i, adapter in enumerate(served):
        start(names[i], adapter, 10 + i)
        run(engine)
    prompts = [random_tokens(11 + 5 * i, seed=i) for i in range(len(served))]
    alone = [generate(engine, [prompt], greedy(24), name)[0] for prompt, name in zip(prompts, names, strict=True)]
    jobs = [start(f"together-{i}", adapter, i) for i, adapter in enumerate(trained)]
    ids = engine.submit_batch(prompts, greedy(24), names)
    log = run(engine)
    assert [log.tokens(request) for request in ids] == alone, (trained, served)
    assert any(report.num_finetune_forward_tokens > 0 and report.num_decode_tokens > 0 for report in log.reports)
    for job, wanted in zip(jobs, losses, strict=True):
        assert len(wanted) == 4
        assert log.losses(job) == pytest.approx(wanted, rel=1e-4), (trained, served)


def test_refusals(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine("llama")
    with pytest.raises(fc.Unsupported, match=r"feedforward_modules: model.layers.0.mlp.gate_proj: other linears read"):
        engine.create_adapter("a", fc.IA3Config(target_modules=["gate_proj"], feedforward_modules=["gate_proj"]))
    with pytest.raises(fc.InvalidArgument, match='non_linearity: "swish2"'):
        engine.create_adapter("a", fc.BottleneckConfig(non_linearity="swish2"))
    with pytest.raises(fc.InvalidArgument, match="bottleneck_size: 0"):
        engine.create_adapter("a", fc.BottleneckConfig(bottleneck_size=0))
    with pytest.raises(fc.InvalidArgument, match="lora_dropout: 1"):
        engine.create_adapter("a", fc.LoraConfig(lora_dropout=1.0))
    with pytest.raises(fc.InvalidArgument, match="LoraConfig, IA3Config, Bottleneck.*or Prefix"):
        engine.create_adapter("a", {"r": 8})  # type: ignore[arg-type]
    assert engine.adapters() == []


@pytest.mark.parametrize("case", ["dora", "ia3", "series"])
def test_planned_memory(case: str, make_engine: MakeEngine, tiny_dir: Any) -> None:
    """An engine takes what a plan says: adapters, with what is derived of them, gradients and optimizer state too."""
    engine = make_engine("llama", max_num_seqs=1)
    engine.create_adapter("a", config_of(case))
    engine.finetune("a", random_examples((70,), seed=3), fc.FinetuneConfig(num_epochs=2))
    run(engine)
    plan = fc.plan(tiny_dir("llama"), engine_config(), config_of(case), 70)
    peak = engine.memory_peak()
    for tag in ("adapters", "gradients", "optimizer", "saved_activations"):
        assert peak[tag] == getattr(plan, tag), tag


def engine_config() -> fc.EngineConfig:
    from engines import EXACT

    return fc.EngineConfig(**(EXACT | {"max_num_seqs": 1}))
