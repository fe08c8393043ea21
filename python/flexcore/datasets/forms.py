"""The row formats people have, brought to four shapes: a conversation, a prompt with its completion, text, tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexcore.datasets.reader import Row


@dataclass
class Conversation:
    messages: list[dict[str, Any]]
    trained: list[bool]  # for each message: has loss
    tools: list[Any] | None = None


@dataclass
class Completion:
    prompt: str
    completion: str


@dataclass
class Text:
    text: str


@dataclass
class Tokens:
    input_ids: list[int]
    labels: list[int] = field(default_factory=list)


Shape = Conversation | Completion | Text | Tokens

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


def detect(row: Row) -> str:
    """The form of a file, from its first row."""
    keys = set(row.value)
    if "input_ids" in keys:
        return "tokens"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if keys & {"chosen", "rejected", "preferred_output"}:
        row.fail("chosen/rejected", "preference data; wanted supervised rows")
    if "text" not in keys:
        row.fail(
            "fields",
            f"got {', '.join(sorted(keys)) or 'none'}; wanted messages | prompt, completion | instruction, output | "
            "conversations | text | input_ids",
        )
    return "text"


def parse(form: str, row: Row) -> Shape:
    return FORMS[form](row)


def _string(row: Row, value: Any, name: str) -> str:
    if not isinstance(value, str):
        row.fail(name, f"got {_shown(value)}, wanted a string")
    return value


def _get_string(row: Row, name: str, default: str | None = None) -> str:
    value = row.value.get(name, default)
    if value is None and default is not None:
        return default
    if name not in row.value and default is None:
        row.fail(name, f"missing; the row has {', '.join(sorted(row.value)) or 'no fields'}")
    return _string(row, value, name)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


def _list(row: Row, name: str) -> list[Any]:
    value = row.value.get(name)
    if not isinstance(value, list) or not value:
        row.fail(name, f"got {_shown(value)}, wanted a list with entries")
    return value


def _tools(row: Row) -> list[Any] | None:
    tools = row.value.get("tools")
    if isinstance(tools, str):  # LLaMA-Factory stores JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            row.fail("tools", "a string that is not JSON")
    if tools is not None and not isinstance(tools, list):
        row.fail("tools", f"got {_shown(tools)}, wanted a list")
    return tools or None


def _message(row: Row, value: Any, name: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(value, Mapping):
        row.fail(name, f"got {_shown(value)}, wanted an object with role and content")
    role = value.get("role")
    if role not in _ROLES:
        row.fail(f"{name}.role", f"got {_shown(role)}, wanted one of {', '.join(_ROLES)}")
    message = {key: item for key, item in value.items() if key != "weight"}
    message["role"] = "system" if role == "developer" else role  # as in a request
    content = value.get("content")
    if isinstance(content, list):  # OpenAI's content parts
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            row.fail(f"{name}.content", "got a part that is not text, wanted text only")
        message["content"] = "".join(str(part) for part in parts)
    elif content is None and (value.get("tool_calls") or value.get("function_call")):
        message["content"] = ""
    elif not isinstance(content, str):
        row.fail(f"{name}.content", f"got {_shown(content)}, wanted a string")
    weight = value.get("weight", 1)
    if weight not in (0, 1) or ("weight" in value and role != "assistant"):
        row.fail(f"{name}.weight", f"got {_shown(weight)} on {role}, wanted 0 or 1 on an assistant message")
    return message, role == "assistant" and bool(weight)


def _messages(row: Row, name: str = "messages") -> Conversation:
    pairs = [_message(row, value, f"{name}[{index}]") for index, value in enumerate(_list(row, name))]
    if not any(message["role"] == "assistant" for message, _ in pairs):
        row.fail(name, "no assistant message, so nothing to learn from")
    return Conversation([message for message, _ in pairs], [trained for _, trained in pairs], _tools(row))


def _prompt_completion(row: Row) -> Shape:
    prompt, completion = row.value.get("prompt"), row.value.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        before = [_message(row, value, f"prompt[{index}]")[0] for index, value in enumerate(prompt)]
        after = [_message(row, value, f"completion[{index}]") for index, value in enumerate(completion)]
        trained = [False] * len(before) + [flag for _, flag in after]
        if not any(trained):
            row.fail("completion", "no assistant message, so nothing to learn from")
        return Conversation(before + [message for message, _ in after], trained, _tools(row))
    return Completion(_get_string(row, "prompt"), _get_string(row, "completion"))


def _alpaca(row: Row) -> Conversation:
    messages: list[dict[str, Any]] = []
    system = _get_string(row, "system", "")
    if system:
        messages.append({"role": "system", "content": system})
    history = row.value.get("history") or []
    if not isinstance(history, list):
        row.fail("history", f"got {_shown(history)}, wanted a list of [question, answer]")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            row.fail(f"history[{index}]", f"got {_shown(pair)}, wanted [question, answer]")
        messages.append({"role": "user", "content": _string(row, pair[0], f"history[{index}][0]")})
        messages.append({"role": "assistant", "content": _string(row, pair[1], f"history[{index}][1]")})
    parts = [_get_string(row, "instruction"), _get_string(row, "input", "")]
    messages.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    messages.append({"role": "assistant", "content": _get_string(row, "output")})
    return Conversation(messages, [message["role"] == "assistant" for message in messages])


def _sharegpt(row: Row) -> Conversation:
    messages: list[dict[str, Any]] = []
    system = _get_string(row, "system", "")
    if system:
        messages.append({"role": "system", "content": system})
    for index, value in enumerate(_list(row, "conversations")):
        name = f"conversations[{index}]"
        if not isinstance(value, Mapping):
            row.fail(name, f"got {_shown(value)}, wanted an object with from and value")
        role = value.get("from", value.get("role"))
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            row.fail(f"{name}.from", f"got {_shown(role)}, wanted one of {', '.join(_SHAREGPT_ROLES)}")
        text = _string(row, value.get("value", value.get("content")), f"{name}.value")
        messages.append({"role": _SHAREGPT_ROLES[role], "content": text})
    trained = [message["role"] == "assistant" for message in messages]
    if not any(trained):
        row.fail("conversations", "no gpt entry, so nothing to learn from")
    return Conversation(messages, trained, _tools(row))


def _ids(row: Row, name: str) -> list[int]:
    value = row.value.get(name)
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        row.fail(name, f"got {_shown(value)}, wanted a list of ints")
    return value


def _tokens(row: Row) -> Tokens:
    ids = _ids(row, "input_ids")
    labels = _ids(row, "labels") if row.value.get("labels") is not None else list(ids)
    if len(labels) != len(ids):
        row.fail("labels", f"got {len(labels)} for {len(ids)} input_ids, wanted as many")
    if row.value.get("attention_mask") is not None:
        mask = _ids(row, "attention_mask")
        if len(mask) != len(ids):
            row.fail("attention_mask", f"got {len(mask)} for {len(ids)} input_ids, wanted as many")
        kept = [index for index, flag in enumerate(mask) if flag]  # padding goes
        ids, labels = [ids[index] for index in kept], [labels[index] for index in kept]
    return Tokens(ids, labels)


FORMS = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": lambda row: Text(_get_string(row, "text")),
    "tokens": _tokens,
}
