"""Text from tokens that arrive one by one: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # how an incomplete UTF-8 sequence decodes
_MOST_HELD = 3  # bytes of a character that is not whole yet
_WINDOW = 64  # tokens, where none adds text: special ones, bytes that are no characters


class Detokenizer:
    """push() returns the text that a token adds; the pieces and finish() join to the decoding of all tokens.

    Only a window of tokens is decoded again: two chunks back, since decoders treat a text's first token specially.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._read = 0  # tokens at the window's start whose text is out
        self._emitted = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        # Byte tokens decode to one each until their character is whole; of more than that can be, the first are none.
        end = max(len(text.rstrip(_REPLACEMENT)), len(text) - _MOST_HELD)
        held = len(text) - end
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if (piece and not held) or len(self._ids) - self._read >= _WINDOW:
            if self._read:
                del self._ids[: self._read]
                self._emitted = max(0, len(self._decode(self._ids)) - held)
            self._read = max(0, len(self._ids) - held)
        return piece

    def finish(self) -> str:
        """What was held back: bytes that never became a character."""
        text = self._decode(self._ids)
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


class StopStrings:
    """Passes text on until a stop string appears; keeps back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        if self.found is not None:
            return ""
        self._held += piece
        if not self._stop:
            return self.finish()
        hits = [(self._held.find(text), text) for text in self._stop if text in self._held]
        if hits:
            position, self.found = min(hits)
            out, self._held = self._held[:position], ""
            return out
        keep = max(self._overlap(text) for text in self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        out, self._held = self._held, ""
        return out

    def _overlap(self, text: str) -> int:
        """Characters at the end of the held text that begin `text`."""
        for size in range(min(len(text) - 1, len(self._held)), 0, -1):
            if self._held.endswith(text[:size]):
                return size
        return 0
