"""GGUF files become Hugging Face directories with the same weights, tokens and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcore as fc
from flexcore import gguf as converter

gguf = pytest.importorskip("gguf")

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\tTabs 12345 3.14159, 1,000",
    "naïve café ÅÄÖ 日本語テキスト 🙂👩‍👩‍👧",
    "def f(x):\n    return x**2  # c",
    "<|im_start|>user\nHi<|im_end|>\n",
    "it's I'LL we'Ve don't",
    "a\u00a0b\u200bc",
    "",
    " ",
    "\n\n\n",
    "x" * 200,
]


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_tokens_are_those_of_transformers(smollm2_dir: Path, theirs: Any, text: str) -> None:
    ours = fc.Tokenizer(smollm2_dir)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_smollm2_digits_stand_alone(smollm2_dir: Path) -> None:
    # What the model was trained with, and llama.cpp does; transformers' reading of GGUF files forgets it.
    ours = fc.Tokenizer(smollm2_dir)
    assert [ours.decode([token]) for token in ours.encode("^2-0.7^2")] == ["^", "2", "-", "0", ".", "7", "^", "2"]


def test_smollm2_chat_template(smollm2_dir: Path, theirs: Any) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "y"},
    ]
    ours = fc.Tokenizer(smollm2_dir)
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == wanted
    assert ours.eos_token_ids() == [theirs.eos_token_id]


def test_directory_loads_in_transformers_with_the_same_weights(smollm2_gguf: Path, smollm2_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    model = load(smollm2_dir, dtype=torch.float32)
    wanted, got = reference.state_dict(), model.state_dict()
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor.bfloat16().float(), got[name]), name
    assert model.config.rope_parameters == reference.config.rope_parameters
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    assert tokenizer("Hi 12")["input_ids"] == fc.Tokenizer(smollm2_dir).encode("Hi 12")
    assert tokenizer.chat_template


def write_gguf(path: Path, source: Path, architecture: str, tokens: dict[str, Any], kind: Any = None) -> Path:
    """`source` (a tiny Hugging Face model) as llama.cpp's converter writes it, in float32 or quantised to `kind`."""
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    for name, value in tokens.items():
        getattr(writer, name)(value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        array = tensor
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            array = array.reshape(count, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        array = np.ascontiguousarray(array, np.float32)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind is not None and array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Letters, digits and space, four merges: enough of a vocabulary for a model of 160 tokens.
_BPE = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "he", "ll", "hell", "hello"]
BPE_TOKENS = {
    "add_tokenizer_model": "gpt2",
    "add_tokenizer_pre": "qwen2",
    "add_token_list": ["<unk>", "<s>", "<|im_end|>", *_BPE, *[f"<|reserved_{k}|>" for k in range(160 - 3 - len(_BPE))]],
    "add_token_types": [3, 3, 3, *[1] * len(_BPE), *[3] * (160 - 3 - len(_BPE))],
    "add_token_merges": ["h e", "l l", "he ll", "hell o"],
    "add_bos_token_id": 1,
    "add_eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("architecture", "source"), [("llama", "llama"), ("llama", "llama_tied"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_every_architecture_round_trips(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str, source: str
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = write_gguf(tmp_path / "m.gguf", tiny_model(source), architecture, BPE_TOKENS)
    target = converter.convert(file, tmp_path / "hf", dtype="float32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = load(tiny_model(source), dtype=torch.float32)(ids).logits
        got = load(target, dtype=torch.float32)(ids).logits
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_quantised_types(tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    from safetensors.numpy import load_file

    quantised = getattr(gguf.GGMLQuantizationType, kind)
    source = tiny_model("qwen2", hidden_size=64, intermediate_size=96)
    file = write_gguf(tmp_path / "m.gguf", source, "qwen2", BPE_TOKENS, quantised)
    target = converter.convert(file, tmp_path / "hf", dtype="float32")
    original, got = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    for name, array in original.items():
        through = gguf.quants.dequantize(gguf.quants.quantize(array, quantised), quantised) if array.ndim > 1 else array
        np.testing.assert_array_equal(got[name], through, err_msg=name)


def test_rounding_to_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    from flexcore.gguf.weights import _encode

    random = np.random.default_rng(0)
    values = np.concatenate([random.standard_normal(10000), [0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-40]]).astype(
        np.float32
    )
    bits = _encode(values, "bfloat16")
    assert np.array_equal(bits, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
    assert np.isnan((_encode(np.array([np.nan], np.float32), "bfloat16").astype(np.uint32) << 16).view(np.float32)[0])


def test_llama3_rope_factors(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from flexcore.gguf.config import rope_scaling

    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, rope_theta=500000.0, rope_scaling=dict(wanted))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)

    class Fake:
        path = Path("x.gguf")
        tensors = {"rope_freqs.weight": type("T", (), {"data": (plain / scaled.numpy()).astype(np.float32)})}  # noqa: RUF012

        def of_model(self, key: str, default: Any = None) -> Any:
            return {"rope.freq_base": 500000.0}.get(key, default)

    fake: Any = Fake()
    assert rope_scaling(fake, 64) == pytest.approx(wanted)
    fake.tensors["rope_freqs.weight"].data[3] = 7
    with pytest.raises(fc.Unsupported):
        rope_scaling(fake, 64)


def sentencepiece_tokens(add_space_prefix: bool) -> dict[str, Any]:
    pieces = ["▁hello", "▁he", "llo", "ll", "▁a", "▁▁", "he", "lo", "▁", *"abcdefghijklmnopqrstuvwxyz", "é"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    return {
        "add_tokenizer_model": "llama",
        "add_tokenizer_pre": "default",
        "add_token_list": tokens,
        "add_token_scores": scores,
        "add_token_types": kinds,
        "add_bos_token_id": 1,
        "add_eos_token_id": 2,
        "add_unk_token_id": 0,
        "add_add_bos_token": True,
        "add_add_space_prefix": add_space_prefix,
    }


def test_sentencepiece(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama", vocab_size=259 + 36)
    file = write_gguf(tmp_path / "m.gguf", source, "llama", sentencepiece_tokens(True))
    tokenizer = fc.Tokenizer(converter.convert(file, tmp_path / "hf"))
    vocabulary = sentencepiece_tokens(True)["add_token_list"]
    pieces = [vocabulary[token] for token in tokenizer.encode("hello a hello")]
    assert pieces == ["<s>", "▁hello", "▁a", "▁hello"]
    for text in ("hello", "  two", "naïve 🙂", "a\nb", "hell"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.detokenizer()
        assert "".join(stream.push(token) for token in ids) + stream.finish() == text
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("hello a", "he llo", "xyz hello é"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_refusals_leave_nothing_behind(smollm2_gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smollm2_gguf.read_bytes()[: 1 << 20])
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    heads = tmp_path / "heads.gguf"
    writer = gguf.GGUFWriter(heads, "llama")
    writer.add_block_count(1)
    writer.add_head_count(0)
    writer.add_embedding_length(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    text = tmp_path / "text.gguf"
    text.write_text("GGUF?")
    refused = (
        (broken, fc.ModelLoadError),
        (other, fc.Unsupported),
        (heads, fc.ModelLoadError),
        (text, fc.ModelLoadError),
    )
    for path, error in refused:
        with pytest.raises(error, match=path.name):
            converter.convert(path, tmp_path / "out")
    with pytest.raises(fc.InvalidArgument, match="dtype"):
        converter.convert(smollm2_gguf, tmp_path / "out", dtype="int8")
    with pytest.raises(fc.InvalidArgument, match="not an empty directory"):
        converter.convert(smollm2_gguf, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "heads.gguf", "other.gguf", "text.gguf"]


def test_resolving_converts_once(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexcore.models import resolve_model

    monkeypatch.setenv("FLEXCORE_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "m.gguf", tiny_model("qwen2"), "qwen2", BPE_TOKENS)
    first = resolve_model(file)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(file)) == first
    assert resolve_model(tmp_path) == first  # a folder with one GGUF file
    assert (first / "config.json").stat().st_mtime_ns == stamp
    write_gguf(tmp_path / "m.gguf", tiny_model("qwen2", num_hidden_layers=1), "qwen2", BPE_TOKENS)
    assert resolve_model(file) != first  # the file changed
    assert resolve_model(first) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("owner/none", "/no/where", "none.gguf"):
        with pytest.raises(fc.ModelLoadError, match=name):
            resolve_model(name)
