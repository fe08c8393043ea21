"""Every row format, what has loss in it, and what errors say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_byte_tokenizer

import flexcore as fc
from flexcore import datasets

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_dir: Path) -> fc.Tokenizer:
    return fc.Tokenizer(byte_tokenizer_dir)


def learned(tokenizer: fc.Tokenizer, example: fc.Example) -> list[str]:
    """The stretches that have loss, as text."""
    out: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            out[-1].append(token)
        elif out[-1]:
            out.append([])
    return [tokenizer.decode(part, skip_special_tokens=False) for part in out if part]


def chat(*turns: str, **last: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    messages: list[dict[str, Any]] = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    messages[-1].update(last)
    return {"messages": messages}


def one(tokenizer: fc.Tokenizer, row: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    dataset = datasets.load([row], tokenizer, **options)
    (example,) = dataset.examples
    return tokenizer.decode(example.input_ids, skip_special_tokens=False), learned(tokenizer, example)


def test_chat(tokenizer: fc.Tokenizer) -> None:
    text, targets = one(tokenizer, chat("hi", "hello", "more", "bye"))
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>\n"
    )
    assert targets == ["hello<|im_end|>", "bye<|im_end|>"]


def test_chat_weight_zero_is_read_but_not_learned(tokenizer: fc.Tokenizer) -> None:
    row = chat("a", "wrong", "b", "right")
    row["messages"][1]["weight"] = 0
    text, targets = one(tokenizer, row)
    assert "wrong" in text
    assert targets == ["right<|im_end|>"]


def test_chat_with_a_tail_parts_and_tools(tokenizer: fc.Tokenizer) -> None:
    row = chat("a", "b", "unanswered")
    row["messages"][1]["content"] = [{"type": "text", "text": "b1"}, {"type": "text", "text": "b2"}]
    text, targets = one(tokenizer, row)
    assert targets == ["b1b2<|im_end|>"]
    assert "unanswered" not in text
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert one(tokenizer, {"messages": [{"role": "user", "content": "x"}, call], "tools": []})[1] == ["<|im_end|>"]


def test_answers_that_begin_with_white_space_keep_it(tokenizer: fc.Tokenizer) -> None:
    text, targets = one(tokenizer, chat("q", "  hello"))
    assert "assistant\n  hello" in text
    assert targets[0].endswith("hello<|im_end|>")


def test_prompt_completion(tokenizer: fc.Tokenizer) -> None:
    assert one(tokenizer, {"prompt": "say ", "completion": "hello"}) == ("say hello<|im_end|>", ["hello<|im_end|>"])
    row = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    assert one(tokenizer, row)[1] == ["a<|im_end|>"]


def test_alpaca_with_history_system_and_input(tokenizer: fc.Tokenizer) -> None:
    row = {"instruction": "do", "input": "x", "output": "y", "system": "sys", "history": [["q", "a"]]}
    text, targets = one(tokenizer, row)
    assert targets == ["a<|im_end|>", "y<|im_end|>"]
    assert "user\ndo\nx<|im_end|>" in text
    assert text.startswith("<|im_start|>system\nsys")


def test_sharegpt(tokenizer: fc.Tokenizer) -> None:
    turns = [("human", "q"), ("function_call", "f()"), ("observation", "1"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "system": "s"}
    text, targets = one(tokenizer, row)
    assert targets == ["f()<|im_end|>", "a<|im_end|>"]
    assert "<|im_start|>tool\n1" in text


def test_text_and_tokens(tokenizer: fc.Tokenizer) -> None:
    assert one(tokenizer, {"text": "hello"}) == ("hello<|im_end|>", ["hello<|im_end|>"])
    row = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    (example,) = datasets.load([row], tokenizer).examples
    assert (example.input_ids, example.labels) == ([5, 6, 7], [-100, 6, 7])
    assert datasets.load([{"input_ids": [5, 6]}], tokenizer).examples[0].labels == [5, 6]


def test_truncation_and_drops_are_counted(tokenizer: fc.Tokenizer) -> None:
    rows = [chat("q", "hello " * 40), chat("q" * 100, "never seen"), chat("q", "a")]
    dataset = datasets.load(rows, tokenizer, max_length=64)
    assert (dataset.rows, len(dataset.examples), dataset.truncated, dataset.dropped) == (3, 2, 2, 1)
    assert all(len(example.input_ids) <= 64 for example in dataset.examples)
    for part in ("3 rows (messages)", "2 truncated", "1 dropped"):
        assert part in dataset.summary()
    assert dataset.target_tokens == sum(label != IGNORED for e in dataset.examples for label in e.labels[1:])
    with pytest.raises(fc.InvalidArgument, match="none of 1 rows"):
        datasets.load([rows[1]], tokenizer, max_length=64)


# Once a later turn follows, an answer's reasoning goes: earlier text is no prefix of later text.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_templates_that_rewrite_history_give_an_example_a_turn(tmp_path: Path) -> None:
    tokenizer = fc.Tokenizer(write_byte_tokenizer(tmp_path, FORGETFUL))
    dataset = datasets.load([chat("q", "<think>x</think>a", "r", "b")], tokenizer)
    assert dataset.split == 1
    assert [learned(tokenizer, e) for e in dataset.examples] == [["<think>x</think>a<|im_end|>"], ["b<|im_end|>"]]
    assert "<think>" not in tokenizer.decode(dataset.examples[1].input_ids)


def test_templates_without_a_stable_prompt_are_refused(tmp_path: Path) -> None:
    shouting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = fc.Tokenizer(write_byte_tokenizer(tmp_path, shouting))
    with pytest.raises(fc.InvalidArgument, match=r"rows\[0\]: messages: .*not prefix-stable"):
        datasets.load([chat("q", "a")], tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1, "b": 2}, "fields: got a, b; wanted messages"),
        ({"messages": []}, "messages: got []"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 'messages[0].role: got "robot"'),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: got 3"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        ({"messages": ["x"]}, "messages[0]: got"),
        ({"prompt": "x", "completion": 3}, "completion: got 3"),
        ({"instruction": "x", "output": None}, "output: got null"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "conversations[0].from"),
        ({"input_ids": [1, "a"]}, "input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: got 1 for 2"),
        ({"chosen": "x", "rejected": "y"}, "preference data"),
        ({"text": "ab\ud83d"}, "text: encode: text: got '\\ud83d' at character 2"),
        ({"prompt": "ab", "completion": "\udc00"}, "prompt, completion: encode: text: got '\\udc00'"),
        (chat("q", "a\ud800"), "messages: encode: text: got '\\ud800'"),
    ],
)
def test_errors_name_row_and_field(tokenizer: fc.Tokenizer, row: dict[str, Any], message: str) -> None:
    with pytest.raises(fc.InvalidArgument) as info:
        datasets.load([row], tokenizer)
    assert message in str(info.value)
    assert str(info.value).startswith("rows[0]: ")


ROWS = [chat("q", f"a{index}") for index in range(3)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.json.gz"])
def test_files(tokenizer: fc.Tokenizer, tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    data = (json.dumps(ROWS) if ".json." in name + "." else lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert len(datasets.load(tmp_path / name, tokenizer).examples) == 3


def test_what_looks_like_the_end_of_a_line_is_text(tokenizer: fc.Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c"}, {"text": "d"}]
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        assert len(datasets.load(tmp_path / name, tokenizer).examples) == 2


def test_a_developer_is_the_system_as_in_a_request(tokenizer: fc.Tokenizer) -> None:
    by_role = [
        datasets.load([{"messages": [{"role": role, "content": "a"}, *chat("b", "c")["messages"]]}], tokenizer)
        for role in ("developer", "system")
    ]
    assert list(by_role[0].examples[0].input_ids) == list(by_role[1].examples[0].input_ids)


def test_json_lines_in_a_json_file_and_folders(tokenizer: fc.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert len(datasets.load(str(tmp_path / "d.json"), tokenizer).examples) == 3
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert len(datasets.load(tmp_path, tokenizer).examples) == 1


def test_file_errors_name_the_line(tokenizer: fc.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n{'a': 1}\n")
    with pytest.raises(fc.InvalidArgument, match=r"d\.jsonl:3: not JSON: .* column 2"):
        datasets.load(path, tokenizer)
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "x", "completion": "y"}))
    with pytest.raises(fc.InvalidArgument, match=r"d\.jsonl:2: messages"):
        datasets.load(path, tokenizer)
    path.write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(fc.InvalidArgument, match=r"d\.jsonl:2: text: .*UTF-8"):
        datasets.load(path, tokenizer)
    path.write_text("[1]\n")
    with pytest.raises(fc.InvalidArgument, match=r"d\.jsonl:1: got list"):
        datasets.load(path, tokenizer)
    path.write_text("")
    with pytest.raises(fc.InvalidArgument, match="no rows"):
        datasets.load(path, tokenizer)
    (tmp_path / "d.jsonl.gz").write_bytes(b"no gzip")
    for bad in ("d.jsonl.gz", "none.jsonl", "d.csv"):
        with pytest.raises(fc.InvalidArgument, match=bad):
            datasets.load(tmp_path / bad, tokenizer)


def test_labels_match_transformers_on_smollm2(smollm2_dir: Path) -> None:
    """Their assistant mask comes from {% generation %} marks, put into SmolLM2's own template here."""
    transformers = pytest.importorskip("transformers")
    tokenizer = fc.Tokenizer(smollm2_dir)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    rows = [chat("What is 2+2?", "4, naïvely 🙂", "And 12,345?", "def f(x):\n    return x\n")]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (example,) = datasets.load(rows, tokenizer).examples
    wanted = theirs.apply_chat_template(
        rows[0]["messages"], chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.input_ids == list(wanted["input_ids"])
    assert [int(label != IGNORED) for label in example.labels] == list(wanted["assistant_masks"])
