"""tokenizer.json from a GGUF vocabulary: byte-level BPE (gpt2) and SentencePiece BPE (llama)."""

from __future__ import annotations

from typing import Any

from flexcore._core import ModelLoadError, Unsupported
from flexcore.gguf.metadata import Metadata

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2  # GGUF token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name of the pre-tokenizer -> (kind, whole words that are tokens skip the merges, adds bos by default)
_PRE: dict[str, tuple[str, bool, bool]] = {
    "llama-bpe": ("llama3", True, True),
    "llama3": ("llama3", True, True),
    "llama-v3": ("llama3", True, True),
    "smaug-bpe": ("llama3", True, True),
    "qwen2": ("qwen2", False, False),
    "deepseek-r1-qwen": ("qwen2", False, False),
    "tekken": ("tekken", True, True),
    "smollm": ("digits", False, False),
    "starcoder": ("digits", False, False),
    "refact": ("digits", False, False),
    "gpt-2": ("gpt2", False, False),
    "default": ("gpt2", False, False),
}
_PATTERNS = {"llama3": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}


def build_tokenizer(metadata: Metadata) -> Any:
    """A tokenizers.Tokenizer with the ids of the original model's."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelLoadError(f"{metadata.path}: no tokenizer.ggml.tokens")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise Unsupported(f"{metadata.path}: tokenizer of type {model!r}; wanted gpt2 (BPE) or llama (SentencePiece)")
    _add_special_tokens(metadata, tokenizer, tokens)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(metadata.need("context_length")),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata),
    }
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for key, role in roles.items():
        token = metadata.token_id(role)
        if token is not None and token < len(tokens):
            config[key] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config


def _pre(metadata: Metadata) -> tuple[str, bool, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise Unsupported(f"{metadata.path}: pre-tokenizer {name!r}; known are {', '.join(_PRE)}")
    return _PRE[name]


def _adds_bos(metadata: Metadata) -> bool:
    default = True if metadata.get("tokenizer.ggml.model") == "llama" else _pre(metadata)[2]
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def _byte_level(metadata: Metadata, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, ignore_merges, _ = _pre(metadata)
    merges = metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise ModelLoadError(f"{metadata.path}: no tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignore_merges))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=kind not in _PATTERNS)
    steps: list[Any] = [byte_level]
    if kind in _PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(_PATTERNS[kind]), behavior="isolated"))
    elif kind == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: Metadata, tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise ModelLoadError(f"{metadata.path}: tokenizer.ggml.scores do not fit tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.token_id("unknown")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_of_scores(tokens, scores, vocabulary),
            unk_token=tokens[unknown if unknown is not None else 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prefix else space)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_of_scores(tokens: list[str], scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores best; BPE wants the pairs, best union first."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(metadata: Metadata, tokenizer: Any, tokens: list[str]) -> None:
    from tokenizers import AddedToken, processors

    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    bos = metadata.token_id("bos")
    if _adds_bos(metadata) and bos is not None:
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, bos)]
        )
