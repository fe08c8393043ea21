"""LoRA of the embedding and the output layer, and either of them trained whole (modules_to_save), against PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from engines import EXACT, MODELS, MakeEngine
from running import generate, greedy, is_idle, random_examples, random_tokens, relative, run
from safetensors.numpy import load_file, save_file
from test_gradients import LENGTHS, SPLIT_TOLERANCE, TOLERANCE, assert_close
from test_methods import trains_alike

import flexcore as fc

TOKENS = random_tokens(40, seed=1)
CASES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "head-and-layers": {"target_modules": ["q_proj", "down_proj", "lm_head"], "rank_pattern": {"lm_head": 7}},
    "embedding": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "both": {"target_modules": ["embed_tokens", "v_proj", "lm_head"], "r": 3},
    "whole-head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "whole-embedding": {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-both": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole-and-lora": {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["lm_head"]},
}


def peft_model(hf: Any, case: str, seed: int = 3, **more: Any) -> Any:
    model = oracle.peft_adapter(hf, seed, **(CASES[case] | more))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "modules_to_save" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.05, generator=generator))
    return model.eval()


def named(gradients: dict[str, Any]) -> dict[str, Any]:
    """Under the names of the files."""
    return {
        name.replace("modules_to_save.default.", "").replace("modules_to_save.", "").removesuffix(".default"): value
        for name, value in gradients.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_against_autograd(case: str, name: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = shared_engine(name)
    model = peft_model(tiny_hf(name), case)
    model.save_pretrained(tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    assert relative(engine.logits(TOKENS, "a"), oracle.logits(model, TOKENS)) < TOLERANCE
    assert relative(engine.logits(TOKENS, "a"), engine.logits(TOKENS)) > 1e-3
    examples = random_examples(LENGTHS, seed=7)
    wanted = named(oracle.gradients(model, examples))
    assert_close(engine.loss_and_gradients("a", examples), wanted, TOLERANCE)
    assert is_idle(engine)
    logits = torch.log_softmax(torch.from_numpy(oracle.logits(model, TOKENS)), -1)
    scores = logits[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].numpy()
    assert np.abs(engine.score(TOKENS, "a") - scores).max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_splits(case: str, make_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine = make_engine("qwen2", max_num_batched_tokens=128, max_num_seqs=1)
    peft_model(tiny_hf("qwen2"), case).save_pretrained(tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    examples = random_examples((70, 23), seed=9)
    wanted = engine.loss_and_gradients("a", examples)
    assert all(np.linalg.norm(value) > 0 for key, value in wanted.items() if key != "loss")
    for split in ((1, 1), (1, None), (None, 1), (9, 17), (33, 7)):
        assert_close(engine.loss_and_gradients("a", examples, *split), wanted, SPLIT_TOLERANCE)


@pytest.mark.parametrize("split", [(None, None), (7, 19)], ids=str)
def test_dropout(split: Any, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Of the output layer too, with rows that have no target in between; the embedding's LoRA drops nothing in PEFT."""
    engine = shared_engine("llama")
    model = peft_model(tiny_hf("llama"), "both", lora_dropout=0.3)
    model.save_pretrained(tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    masks = oracle.mask_dropouts(model.train(), 0.3, seed=5)
    example = random_examples((41,), seed=7)[0]
    example = fc.Example(example.input_ids, [-100 if i % 5 == 2 else x for i, x in enumerate(example.input_ids)])
    assert len(masks) > 2
    wanted = named(oracle.gradients(model, [example]))
    got = engine.loss_and_gradients("a", [example], *split, dropout_seed=5)
    assert_close(got, wanted, TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_into_peft(case: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Made, trained and saved here; loaded by PEFT, and by flexcore again."""
    engine = shared_engine("llama3")
    engine.create_adapter("a", fc.LoraConfig(**({"r": 4} | CASES[case])), seed=5)
    before = engine.logits(TOKENS, "a")
    assert relative(before, engine.logits(TOKENS)) < 1e-6  # a new adapter changes nothing
    engine.finetune("a", random_examples((20, 30), seed=1), fc.FinetuneConfig(learning_rate=0.02, num_epochs=3))
    run(engine)
    ours = engine.logits(TOKENS, "a")
    assert relative(ours, before) > 1e-3
    engine.save_adapter("a", tmp_path)
    theirs = oracle.load_peft(tiny_hf("llama3"), tmp_path)
    assert relative(ours, oracle.logits(theirs, TOKENS)) < TOLERANCE
    engine.load_adapter("b", tmp_path)
    assert np.array_equal(engine.logits(TOKENS, "b"), ours)


@pytest.mark.parametrize("case", ["both", "whole-both"])
def test_training(case: str, shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """The losses of AdamW, step by step."""
    engine = shared_engine("llama3")
    model = peft_model(tiny_hf("llama3"), case)
    model.save_pretrained(tmp_path / "a")
    engine.load_adapter("a", tmp_path / "a")
    trains_alike(engine, model, rate=0.01)


def test_side_by_side(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """All of them in one batch, beside the base model and a job: each request's tokens are those it gets alone."""
    engine = shared_engine("llama")
    names: list[str | None] = [None]
    for case in CASES:
        peft_model(tiny_hf("llama"), case, seed=len(names)).save_pretrained(tmp_path / case)
        engine.load_adapter(case, tmp_path / case)
        names += [case, case]
    prompts = [random_tokens(9 + i, seed=i) for i in range(len(names))]
    alone = [generate(engine, [prompt], greedy(12), name)[0] for prompt, name in zip(prompts, names, strict=True)]
    engine.create_adapter("t", fc.LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"]))
    engine.finetune("t", random_examples((30, 20), seed=1), fc.FinetuneConfig(num_epochs=4))
    assert generate(engine, prompts, greedy(12), names) == alone
    assert len(set(map(tuple, alone))) == len(alone)
    run(engine)


def test_plan_is_what_it_takes(tiny_dir: Any) -> None:
    for case, fields in CASES.items():
        config, path = fc.LoraConfig(**fields), tiny_dir("llama")
        options = fc.EngineConfig(**(EXACT | {"max_num_seqs": 1}))
        engine = fc.Engine(path, options)
        engine.create_adapter("a", config)
        engine.finetune("a", random_examples((60,) * 2, seed=1), fc.FinetuneConfig(batch_size=1))
        run(engine)
        planned = fc.plan(path, options, config, sequence_length=60)
        peak = engine.memory_peak()
        for name in ("adapters", "gradients", "optimizer", "saved_activations"):
            assert peak[name] == getattr(planned, name), (case, name)
        assert peak["workspace"] <= planned.workspace


def test_files_of_peft(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """PEFT writes the frozen table beside an embedding's LoRA; what is missing or too much is named."""
    engine = shared_engine("llama")
    peft_model(tiny_hf("llama"), "whole-and-lora").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(name.endswith("embed_tokens.base_layer.weight") for name in tensors)
    engine.load_adapter("a", tmp_path / "a")

    def with_tensors(change: dict[str, Any], message: str) -> None:
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        kept = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(kept, tmp_path / "b" / "adapter_model.safetensors")
        with pytest.raises(fc.Error, match=message):
            engine.load_adapter("b", tmp_path / "b")

    prefix = "base_model.model."
    with_tensors({f"{prefix}lm_head.weight": None}, r"no tensor base_model\.model\.lm_head\.weight")
    with_tensors({f"{prefix}model.embed_tokens.lora_embedding_B": None}, "no tensor .*lora_embedding_B")
    with_tensors({f"{prefix}model.norm.weight": np.ones((1, 4), np.float32)}, "model.norm is there whole")
    with_tensors({f"{prefix}lm_head.weight": np.ones((3, 4), np.float32)}, r"lm_head\.weight is \[3, 4\], wanted")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fc.LoraConfig(modules_to_save=["norm"]), 'modules_to_save: "norm", wanted "embed_tokens" or "lm_head"'),
        (fc.LoraConfig(target_modules=["lm_head"], modules_to_save=["lm_head"]), "one of the target_modules too"),
        (fc.LoraConfig(modules_to_save=["lm_head", "lm_head"]), "there twice"),
        (fc.LoraConfig(target_modules=["lm_head"], use_dora=True), "with use_dora, wanted linears of the layers"),
        (fc.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "take LoRA, no other adapter"),
        (fc.BottleneckConfig(4, target_modules=["embed_tokens"]), "take LoRA, no other adapter"),
    ],
    ids=str,
)
def test_refusals(config: Any, message: str, shared_engine: MakeEngine) -> None:
    engine = shared_engine("llama")
    with pytest.raises(fc.Error, match=message):
        engine.create_adapter("a", config)
    assert is_idle(engine)
