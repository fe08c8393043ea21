"""Logits and greedy tokens against transformers: every architecture, a real model, sharded and GGUF files."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from engines import EXACT, MODELS, MakeEngine
from running import generate, greedy, random_tokens, relative

import flexcore as fc

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4  # of logits, relative, norm-wise, float32
LONG = 150  # more than two passes of the engine's 64 rows, and than every sliding window

PROMPTS = [
    "Gravity is",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "To bake bread you need flour, water,",
    "The three laws of thermodynamics are",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\nx = np.",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "Water boils at",
    "<|im_start|>user\nWhat is a prime number?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name FROM users WHERE",
    "The Industrial Revolution began in",
    "In mathematics, a group is a set with",
    "She opened the door and saw",
    "The best way to learn a language is",
    "Q: How many legs does a spider have?\nA:",
]


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


def score_of(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    shifted = logits[:-1].astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=-1))
    return shifted[np.arange(len(tokens) - 1), tokens[1:]] - log_sums


@pytest.mark.parametrize("name", MODELS)
def test_tiny_logits(name: str, shared_engine: MakeEngine, tiny_hf: Any) -> None:
    engine = shared_engine(name)
    for length in (1, 2, 7, 64, LONG):
        tokens = random_tokens(length, seed=length)
        wanted = oracle.logits(tiny_hf(name), tokens)
        assert relative(engine.logits(tokens), wanted) < TOLERANCE
        assert engine.score(tokens) == pytest.approx(score_of(wanted, tokens), abs=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_greedy(name: str, shared_engine: MakeEngine, tiny_hf: Any) -> None:
    prompts = [random_tokens(length, seed=length) for length in (1, 5, 40, 90)]
    for prompt, tokens in zip(prompts, generate(shared_engine(name), prompts, greedy(24)), strict=True):
        assert len(tokens) == 24
        assert_greedy(oracle.logits(tiny_hf(name), prompt + tokens), prompt, tokens)


def assert_greedy(logits: np.ndarray, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the oracle's best after everything before it: what a greedy search of the oracle's own finds."""
    assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == tokens


def test_adapter_logits(shared_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    engine, tokens = shared_engine("llama"), random_tokens(33, seed=1)
    model = oracle.peft_adapter(tiny_hf("llama"), seed=1, scale=0.2)
    model.save_pretrained(tmp_path)
    engine.load_adapter("a", tmp_path)
    assert relative(engine.logits(tokens, "a"), oracle.logits(model, tokens)) < TOLERANCE
    assert relative(engine.logits(tokens, "a"), engine.logits(tokens)) > 0.05
    engine.unload_adapter("a")


def test_smollm2_logits(smollm2_engine: fc.Engine, smollm2_hf: Any, prompts: list[list[int]]) -> None:
    for tokens in (prompts[3], list(itertools.chain(*prompts))):  # the second is longer than a pass
        wanted = oracle.logits(smollm2_hf, tokens)
        assert relative(smollm2_engine.logits(tokens), wanted) < TOLERANCE
        assert smollm2_engine.score(tokens) == pytest.approx(score_of(wanted, tokens), abs=1e-3)


def test_smollm2_greedy(smollm2_engine: fc.Engine, smollm2_hf: Any, prompts: list[list[int]]) -> None:
    served = generate(smollm2_engine, prompts, greedy(64))
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = smollm2_hf.generate(
        padded, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0
    )[:, longest:]
    for prompt, tokens, wanted in zip(prompts, served, made.tolist(), strict=True):
        assert len(tokens) == 64
        if not set(tokens) & set(smollm2_engine.model().eos_token_ids):
            assert tokens == wanted
        else:  # generate hides the end of sequence from itself while it must go on
            assert_greedy(oracle.logits(smollm2_hf, prompt + tokens), prompt, tokens)


def test_bfloat16_error(smollm2_dir: Path, smollm2_hf: Any, prompts: list[list[int]]) -> None:
    """bfloat16 is no further from float32 than 1.5 times what transformers' own bfloat16 is."""
    rounded = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16).eval()
    engine = fc.Engine(smollm2_dir, fc.EngineConfig(**(EXACT | {"dtype": "bfloat16", "max_model_len": 512})))
    tokens = list(itertools.chain(*prompts))
    exact = oracle.logits(smollm2_hf, tokens)
    assert relative(engine.logits(tokens), exact) <= 1.5 * relative(oracle.logits(rounded, tokens), exact)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bfloat16_tiny(name: str, make_engine: MakeEngine, tiny_hf: Any) -> None:
    tokens = random_tokens(LONG, seed=5)
    exact = oracle.logits(tiny_hf(name), tokens)
    theirs = oracle.logits(copy.deepcopy(tiny_hf(name)).to(torch.bfloat16), tokens)
    ours = make_engine(name, dtype="bfloat16").logits(tokens)
    assert relative(ours, exact) <= 1.5 * relative(theirs, exact)


def test_sharded_safetensors(make_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    tiny_hf("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    tokens = random_tokens(20, seed=3)
    assert relative(make_engine(tmp_path).logits(tokens), oracle.logits(tiny_hf("qwen2"), tokens)) < TOLERANCE


def test_weights_of_other_types(make_engine: MakeEngine, tiny_hf: Any, tmp_path: Path) -> None:
    """Files in bfloat16 and float16 are widened exactly."""
    tokens = random_tokens(20, seed=3)
    for dtype in (torch.bfloat16, torch.float16):
        copy.deepcopy(tiny_hf("llama")).to(dtype).save_pretrained(tmp_path / str(dtype))
        stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype=torch.float32)
        assert (
            relative(make_engine(tmp_path / str(dtype)).logits(tokens), oracle.logits(stored.eval(), tokens))
            < TOLERANCE
        )


def test_gguf_file(smollm2_gguf: Path, smollm2_hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file itself is a model argument."""
    monkeypatch.setenv("FLEXCORE_CACHE", str(tmp_path))
    engine = fc.Engine(smollm2_gguf, fc.EngineConfig(**(EXACT | {"max_model_len": 64, "max_num_seqs": 2})))
    tokens = list(range(100, 140))
    assert relative(engine.logits(tokens), oracle.logits(smollm2_hf, tokens)) < TOLERANCE
