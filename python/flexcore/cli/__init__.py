"""The flexcore command: one module a verb, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

# In the order in which a newcomer meets them.
VERBS = {
    "demo": "serve and finetune a real model at once, here in the terminal",
    "serve": "an OpenAI-compatible server that serves and finetunes at once",
    "chat": "talk to a model",
    "generate": "complete prompts",
    "train": "finetune a LoRA adapter on a data file",
    "plan": "where the memory goes, before anything is loaded",
    "inspect": "what a model, adapter or GGUF file is",
    "convert": "GGUF file to Hugging Face directory",
    "bench": "measure kernels, latency, throughput, memory, quantization, finetuning kept (coserve), a server (serve)",
    "doctor": "check this machine and this installation",
    "completion": "a script that completes this command in a shell",
}


def load_verb(name: str) -> ModuleType:
    """The module of a verb: add_arguments(parser) and run(args) -> exit code."""
    return importlib.import_module(f"flexcore.cli.{name}")


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    import flexcore

    parser = argparse.ArgumentParser(prog="flexcore", description=flexcore.__doc__)
    parser.add_argument("--version", action="version", version=f"flexcore {flexcore.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        if name in argv:  # only the verb in use is imported
            load_verb(name).add_arguments(verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    import flexcore

    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(arguments).parse_args(arguments)
    try:
        return int(load_verb(args.verb).run(args) or 0)
    except flexcore.Error as error:
        print(f"flexcore {args.verb}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `flexcore ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"flexcore {args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
