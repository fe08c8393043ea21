"""flexcore generate MODEL --prompt TEXT, or prompts from standard input"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from flexcore import InvalidArgument
from flexcore.cli import options
from flexcore.cli.console import load_llm, out

if TYPE_CHECKING:
    from flexcore.llm import RequestOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--prompt", "-p", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message for the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer")
    parser.add_argument("-n", type=int, default=1, help="answers a prompt")
    parser.add_argument("--logprobs", type=int, metavar="K", help="with --json: the K most likely tokens beside each")
    options.add_sampling(parser, max_tokens=128, temperature=0.0)
    options.add_adapters(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    try:
        prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"prompt: standard input is not {error.encoding}: {error.reason}") from None
    if not prompts:
        raise InvalidArgument("prompt: got none, wanted --prompt TEXT or lines on standard input")
    adapters = options.adapters_of(args)
    llm = load_llm(options.model_of(args), options.engine_config(args), adapters)
    sampling = options.sampling_params(args)
    sampling.n, sampling.logprobs = args.n, args.logprobs
    adapter = adapters[0][0] if adapters else None
    if args.chat:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling, adapter)
    else:
        outputs = llm.generate(prompts, sampling, adapter)
    for prompt, output in zip(prompts, outputs, strict=True):
        _show(args, prompt, output, alone=len(prompts) * args.n == 1)
    return 0


def _show(args: argparse.Namespace, prompt: str, output: RequestOutput, alone: bool) -> None:
    for answer in output.outputs:
        if args.json:
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(answer)}, ensure_ascii=False))
        elif alone:
            print(answer.text)
        else:
            out.print("> ", end="", style="bold")
            out.print(prompt, markup=False, style="cyan", soft_wrap=True)
            print(answer.text, end="\n\n")
