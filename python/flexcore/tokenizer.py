"""fc.Tokenizer: tokenizer.json and the chat template of a model directory, without transformers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexcore._core import InvalidArgument, ModelLoadError
from flexcore.chat_template import ChatTemplate, Message
from flexcore.detokenizer import Detokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2): themselves where they print, or the next from 256."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, directory: str | Path, chat_template: str | None = None) -> None:
        """`chat_template` (jinja2 source) replaces the model's own. Raises ModelLoadError."""
        self.directory = Path(directory)
        self._tokenizer = _load(self.directory)
        config = _read_json(self.directory / "tokenizer_config.json")
        self.special_tokens = _special_tokens(config, _read_json(self.directory / "special_tokens_map.json"))
        source = chat_template or _template_source(self.directory, config)
        self.chat_template = ChatTemplate(source, self.special_tokens) if source else None

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("eos_token", ""))

    def eos_token_ids(self) -> list[int]:
        """Every token that ends a turn: the tokenizer's, config.json's and generation_config.json's."""
        found = [self.eos_token_id]
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.directory / name).get("eos_token_id")
            found += value if isinstance(value, list) else [value]
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters; a text of more than so many times n has more than n tokens."""
        return max(map(len, self._tokenizer.get_vocab()))

    def token_id(self, token: str) -> int | None:
        value = self._tokenizer.token_to_id(token)
        return None if value is None else int(value)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._encode(text, add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [begin, end) that it covers."""
        encoding = self._encode(text, add_special_tokens)
        return list(encoding.ids), [(begin, end) for begin, end in encoding.offsets]

    def _encode(self, text: str, add_special_tokens: bool) -> Any:
        if not isinstance(text, str):
            raise InvalidArgument(f"encode: text: got {text!r} ({type(text).__name__}), wanted a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InvalidArgument(
                f"encode: text: got {text[error.start]!r} at character {error.start}, wanted text that UTF-8 can hold"
            ) from None
        # A batch of one: unlike encode(), it lets other threads go on meanwhile.
        return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """As the vocabulary writes it."""
        return str(self._tokenizer.id_to_token(token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """What it stands for in UTF-8, which may be a part of a character."""
        text = self.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text.encode()
        token = self.token(token_id)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):  # SentencePiece's
            return bytes([int(token[3:5], 16)])
        values = [_BYTE_OF.get(character) for character in token]
        return text.encode() if None in values else bytes(value for value in values if value is not None)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(lambda ids: self.decode(ids, skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model reads it. Raises InvalidArgument without a template."""
        if self.chat_template is None:
            raise InvalidArgument(
                f"chat: {self.directory} has no chat template; pass chat_template=, or use prompts instead of messages"
            )
        return self.chat_template.render(messages, tools, add_generation_prompt, **variables)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **variables: Any
    ) -> list[int]:
        """Ids of the conversation, up to where the assistant speaks. The template writes its own special tokens."""
        return self.encode(self.apply_chat_template(messages, tools, **variables), add_special_tokens=False)


def _load(directory: Path) -> Any:
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{directory}: no tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelLoadError(f"{path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    return value if isinstance(value, dict) else {}


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    out: dict[str, str] = {}
    for source in sources:
        for role in _ROLES:
            token = source.get(role)
            if isinstance(token, dict):  # an AddedToken
                token = token.get("content")
            if isinstance(token, str):
                out.setdefault(role, token)
    return out


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    return source if isinstance(source, str) else None
