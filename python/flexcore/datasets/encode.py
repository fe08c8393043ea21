"""Tokens and labels of a row; exactly the assistant's words have loss, found by rendering the template turn by turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexcore._core import InvalidArgument
from flexcore.datasets.forms import Completion, Conversation, Shape, Text, Tokens
from flexcore.datasets.reader import Row
from flexcore.tokenizer import Tokenizer

IGNORED = -100
_FIELDS = {Conversation: "messages", Completion: "prompt, completion", Text: "text", Tokens: "input_ids"}
Sequence = tuple[list[int], list[int]]  # input_ids, labels
Span = tuple[int, int]  # characters [begin, end)


@dataclass
class Encoded:
    examples: list[Sequence] = field(default_factory=list)
    truncated: int = 0


class Encoder:
    def __init__(self, tokenizer: Tokenizer, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._ends = tokenizer.eos_token_ids()

    def encode(self, shape: Shape, row: Row) -> Encoded:
        out = Encoded()
        try:
            sequences = self._sequences(shape)
        except InvalidArgument as error:
            row.fail(_FIELDS[type(shape)], str(error))
        for ids, labels in sequences:
            if self._max_length is not None and len(ids) > self._max_length:
                ids, labels = ids[: self._max_length], labels[: self._max_length]
                out.truncated += 1
            if any(label != IGNORED for label in labels[1:]):
                out.examples.append((ids, labels))
        return out

    def _sequences(self, shape: Shape) -> list[Sequence]:
        if isinstance(shape, Tokens):
            return [(shape.input_ids, shape.labels)]
        if isinstance(shape, Text):
            return [self._plain(shape.text, 0)]
        if isinstance(shape, Completion):
            return [self._plain(shape.prompt + shape.completion, len(shape.prompt))]
        return self._conversation(shape)

    def _plain(self, text: str, begin: int) -> Sequence:
        """Text whose characters from `begin` on have loss, and an end of sequence."""
        ids, labels = self._label(text, [(begin, len(text))], add_special_tokens=True)
        eos = self._tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
            labels.append(eos)
        return ids, labels

    def _conversation(self, shape: Conversation) -> list[Sequence]:
        turns = [index for index, trained in enumerate(shape.trained) if trained]
        if not turns:
            return []
        # What follows the last trained answer teaches nothing.
        whole = self._render(shape, turns[-1] + 1)
        spans = [self._turn(shape, index) for index in turns]
        if all(whole.startswith(text) for text, _ in spans):
            return [self._label(whole, [span for _, span in spans])]
        # The template writes earlier turns otherwise once later ones follow (it drops reasoning, say). One example a
        # turn then shows each answer in the context in which it is given.
        return [self._label(text, [span]) for text, span in spans]

    def _turn(self, shape: Conversation, index: int) -> tuple[str, Span]:
        """The conversation up to and with message `index`, and the characters that the assistant writes in it."""
        text = self._render(shape, index + 1)
        before = self._render(shape, index, add_generation_prompt=True)
        if not text.startswith(before):
            raise InvalidArgument(
                f"the chat template is not prefix-stable: with message {index} its text does not begin with the prompt "
                "for it; pass a template that is, or token rows (input_ids, labels)"
            )
        return text, (len(before), len(text))

    def _render(self, shape: Conversation, count: int, add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(shape.messages[:count], shape.tools, add_generation_prompt)

    def _label(self, text: str, spans: list[Span], add_special_tokens: bool = False) -> Sequence:
        ids, offsets = self._tokenizer.encode_with_offsets(text, add_special_tokens)
        labels = [IGNORED] * len(ids)
        token = 0
        for begin, end in spans:
            while token < len(ids) and offsets[token][0] < begin:
                token += 1
            first = token
            while token < len(ids) and offsets[token][1] <= end and offsets[token][0] < end:
                token += 1
            last = self._end_of_turn(text, ids, offsets, (first, token), end)
            labels[first:last] = ids[first:last]
        return ids, labels

    def _end_of_turn(self, text: str, ids: list[int], offsets: list[Span], tokens: Span, end: int) -> int:
        """The turn stops at its end-of-turn token: white space that the template adds after it is never generated."""
        first, last = tokens
        for token in range(last - 1, first - 1, -1):
            if ids[token] in self._ends:
                return token + 1 if not text[offsets[token][1] : end].strip() else last
        return last
