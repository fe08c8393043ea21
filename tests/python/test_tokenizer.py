"""Tokenizer, chat template, incremental text and stop strings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, write_byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import flexcore as fc
from flexcore.chat_template import ChatTemplate
from flexcore.detokenizer import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_dir: Path) -> fc.Tokenizer:
    return fc.Tokenizer(byte_tokenizer_dir)


def test_text_goes_round(tokenizer: fc.Tokenizer) -> None:
    for text in ("hello a\n\nworld", "naïve 日本語 🙂", "", " "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_ids() == [2]
    assert tokenizer.bos_token_id == 1


@pytest.mark.parametrize("text", ["\ud800", "ab\udc80", 3, None])
def test_what_is_no_text_is_refused(tokenizer: fc.Tokenizer, text: Any) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(fc.InvalidArgument, match=r"encode: text: got"):
            encode(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [("hello", ["hello"]), ("é", ["", "é"]), ("🙂!", ["", "", "", "🙂", "!"])],
)
def test_no_half_characters(tokenizer: fc.Tokenizer, text: str, pieces: list[str]) -> None:
    stream = tokenizer.detokenizer()
    assert [stream.push(token) for token in tokenizer.encode(text)] == pieces
    assert stream.finish() == ""


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 265), max_size=200))
def test_pieces_join_to_the_whole(byte_tokenizer_dir: Path, ids: list[int]) -> None:
    tokenizer = _cached(byte_tokenizer_dir)
    for skip in (True, False):
        stream = tokenizer.detokenizer(skip)
        assert "".join([stream.push(token) for token in ids]) + stream.finish() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("text", ["", "\ufffd"], ids=["special", "no character"])
def test_what_adds_no_text_is_not_decoded_again(byte_tokenizer_dir: Path, text: str) -> None:
    tokenizer, longest = _cached(byte_tokenizer_dir), 0
    token = next(token for token in range(265, 0, -1) if tokenizer.decode([token]) == text)

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    stream = Detokenizer(decode)
    ids = [*tokenizer.encode("a"), *[token] * 1000, *tokenizer.encode("\U0001f642")]
    pieces = "".join([stream.push(i) for i in ids])
    assert longest < 200
    assert pieces + stream.finish() == tokenizer.decode(ids)


def test_bytes_of_tokens(tokenizer: fc.Tokenizer) -> None:
    for text in ("hello", "\u00e9", "\U0001f642"):
        assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()


_TOKENIZERS: dict[Path, fc.Tokenizer] = {}


def _cached(directory: Path) -> fc.Tokenizer:
    return _TOKENIZERS.setdefault(directory, fc.Tokenizer(directory))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_cut_where_the_whole_text_would(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    checker = StopStrings(stop)
    out = "".join(checker.push(text[a:b]) for a, b in itertools.pairwise(edges)) + checker.finish()
    # The first stop string to be complete wins, as if text came letter by letter.
    if checker.found is None:
        assert out == text
        assert not any(word in text for word in stop)
    else:
        assert text.startswith(out + checker.found)
        assert not any(word in out for word in stop)


def test_template_knows_what_authors_use() -> None:
    source = (
        "{%- for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{%- endfor %}{{ bos_token }}"
        "{{ strftime_now('%Y') | length }}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": 'é"'}]
    assert template.render(messages) == '"é\\""<s>4'
    assert '"a"' in template.render(messages, tools=[{"a": 1}])


def test_arguments_of_tool_calls_are_json_once() -> None:
    """As OpenAI's clients send them, and as data sets have them: text or not."""
    template = ChatTemplate("{% for m in messages %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}")
    for arguments in ('{"city": "Bern"}', {"city": "Bern"}):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        assert template.render([{"role": "assistant", "tool_calls": [call]}]) == '{"city": "Bern"}'
    call["function"] = {"name": "weather", "arguments": "no JSON"}
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == '"no JSON"'


def test_template_errors_are_ours() -> None:
    with pytest.raises(fc.InvalidArgument, match="only users"):
        ChatTemplate("{{ raise_exception('only users') }}").render([])
    with pytest.raises(fc.InvalidArgument, match="chat template"):
        ChatTemplate("{% for %}")
    with pytest.raises(fc.InvalidArgument):  # the sandbox
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])


def test_templates_come_from_where_models_keep_them(tmp_path: Path) -> None:
    bare = write_byte_tokenizer(tmp_path / "bare", chat_template=None)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(fc.InvalidArgument, match="no chat template"):
        fc.Tokenizer(bare).encode_chat(messages)
    assert fc.Tokenizer(bare, CHATML).apply_chat_template(messages).endswith("assistant\n")
    (bare / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert fc.Tokenizer(bare).apply_chat_template(messages) == "file <|im_end|>"
    named = tmp_path / "bare" / "tokenizer_config.json"
    (bare / "chat_template.jinja").unlink()
    named.write_text(json.dumps({"chat_template": [{"name": "default", "template": "named"}]}))
    assert fc.Tokenizer(bare).apply_chat_template(messages) == "named"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(fc.ModelLoadError, match="no tokenizer.json"):
        fc.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(fc.ModelLoadError, match="tokenizer.json"):
        fc.Tokenizer(tmp_path)
