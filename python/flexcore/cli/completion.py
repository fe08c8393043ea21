"""flexcore completion SHELL: prints a script; eval "$(flexcore completion bash)" in the shell's start file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_BASH = """_flexcore() {{
  local path="" word i
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${{COMP_WORDS[i]}}
    case "$path $word" in {nodes}) path="$path $word" ;; esac
  done
  case "$path" in
{cases}
  esac
}}
complete -o default -F _flexcore flexcore"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> int:
    from flexcore.cli import VERBS, build_parser

    tree = dict(_walk("", build_parser(list(VERBS))))
    print(_fish(tree) if args.shell == "fish" else _bash(tree, zsh=args.shell == "zsh"))
    return 0


def _walk(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Words that may follow each chain of verbs."""
    words: list[str] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        if isinstance(action, argparse._SubParsersAction):
            words += list(action.choices)
            for name, child in action.choices.items():
                yield from _walk(f"{path} {name}", child)
    yield path, words


def _bash(tree: dict[str, list[str]], zsh: bool) -> str:
    cases = "\n".join(
        f'    "{path}") COMPREPLY=($(compgen -W "{" ".join(words)}" -- "${{COMP_WORDS[COMP_CWORD]}}")) ;;'
        for path, words in tree.items()
    )
    nodes = "|".join(f'"{path}"' for path in tree if path)
    script = _BASH.format(nodes=nodes, cases=cases)
    return "autoload -U +X bashcompinit && bashcompinit\n" + script if zsh else script


def _fish(tree: dict[str, list[str]]) -> str:
    lines = []
    for path, words in tree.items():
        parts = path.split()
        condition = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in parts) or "__fish_use_subcommand"
        for word in words:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            lines.append(f"complete -c flexcore -n '{condition}' {what}")
    return "\n".join(lines)
