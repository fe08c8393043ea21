"""flexcore chat MODEL: a conversation in the terminal"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.text import Text

import flexcore
from flexcore.cli import options
from flexcore.cli.console import err, load_llm

if TYPE_CHECKING:
    from flexcore.llm import LLM

_HELP = (
    "/reset starts anew, /system TEXT sets the system message, /adapter NAME changes the adapter (none: without), "
    "/exit or Ctrl-D leaves, Ctrl-C stops an answer"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_sampling(parser, max_tokens=512, temperature=0.0)
    options.add_adapters(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    adapters = options.adapters_of(args)
    llm = load_llm(options.model_of(args), options.engine_config(args), adapters)
    session = _Session(llm, options.sampling_params(args), adapters[0][0] if adapters else None, args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        model = llm.engine.model()
        weights = model.dtype if model.quantization == "none" else f"{model.dtype}, {model.quantization} linears"
        name = Text(llm.engine.model_directory.name, style="bold")
        err.print(name, f"on {model.device}, {weights}. {_HELP}.", style="dim")
    while True:
        try:
            line = input("\n> " if interactive else "")
        except EOFError:
            return 0
        if line.strip() in ("/exit", "/quit"):
            return 0
        if line.strip():
            session.take(line.strip())


class _Session:
    def __init__(self, llm: LLM, sampling: flexcore.SamplingParams, adapter: str | None, system: str | None) -> None:
        self._llm, self._sampling, self._adapter = llm, sampling, adapter
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def take(self, line: str) -> None:
        command, *rest = line.split(maxsplit=1)
        if line == "/reset":
            self._reset()
        elif command == "/system":
            self._system = rest[0] if rest else None
            self._reset()
        elif command == "/adapter":
            self._change_adapter(rest[0] if rest else None)
        elif line == "/help":
            err.print(_HELP, style="dim")
        else:
            self._answer(line)

    def _change_adapter(self, name: str | None) -> None:
        """The conversation goes on with it."""
        known = [adapter.name for adapter in self._llm.engine.adapters()]
        if name == "none":
            self._adapter = None
        elif name in known:
            self._adapter = name
        elif name is not None:
            err.print(f"/adapter: got {name!r}, wanted one of {', '.join([*known, 'none'])}", style="red", markup=False)
            return
        err.print(f"adapter: {self._adapter or 'none'} (of {', '.join([*known, 'none'])})", style="dim", markup=False)

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        start = time.perf_counter()
        try:
            for piece in self._llm.stream(self._messages, self._sampling, self._adapter):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except flexcore.InvalidArgument as error:  # the conversation outgrew the model, say
            self._messages.pop()
            err.print(f"{error}", style="red", markup=False)
            return
        print()
        text = "".join(pieces)
        self._messages.append({"role": "assistant", "content": text})
        if err.is_terminal:
            count = len(self._llm.tokenizer.encode(text, add_special_tokens=False))
            elapsed = time.perf_counter() - start
            err.print(f"{count} tokens, {count / max(elapsed, 1e-9):.0f} tokens/s", style="dim")
