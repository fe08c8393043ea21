"""flexcore inspect PATH: what a model directory, GGUF file, adapter or checkpoint holds"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flexcore import ModelLoadError
from flexcore.cli import options
from flexcore.cli.console import out
from flexcore.ui import format_bytes

_CONFIG = [
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "rms_norm_eps",
    "tie_word_embeddings",
]
_ADAPTER = [
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_of(args)).expanduser()
    if path.suffix == ".gguf":
        return _gguf(path, args.tensors)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _directory(path, "adapter_config.json", _ADAPTER, args.tensors)
    if path.is_dir() and (path / "config.json").is_file():
        return _directory(path, "config.json", _CONFIG, args.tensors)
    raise ModelLoadError(f"inspect: {path} is no model directory, adapter directory or .gguf file")


def _directory(path: Path, config_name: str, names: list[str], list_tensors: bool) -> int:
    try:
        config = json.loads((path / config_name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"inspect: {path / config_name}: {error}") from error
    rows = [(name, _shown(config[name])) for name in names if config.get(name) is not None]
    tensors: list[tuple[str, str, list[int], int]] = []
    for file in sorted(path.glob("*.safetensors")):
        tensors += _safetensors(file)
    _summary(path, rows, tensors)
    if config_name == "config.json":
        _tokenizer(path)
    if list_tensors:
        _list(tensors)
    return 0


def _gguf(path: Path, list_tensors: bool) -> int:
    from flexcore.gguf import Metadata
    from flexcore.gguf.config import model_config

    metadata = Metadata(path)
    config = model_config(metadata, "bfloat16")
    rows = [("format", "GGUF")] + [(name, _shown(config[name])) for name in _CONFIG if config.get(name) is not None]
    rows.append(("tokenizer", f"{metadata.get('tokenizer.ggml.model')} / {metadata.get('tokenizer.ggml.pre', '-')}"))
    rows.append(("chat template", "yes" if metadata.get("tokenizer.chat_template") else "no"))
    tensors = [
        (name, str(tensor.tensor_type.name), [int(size) for size in reversed(tensor.shape)], int(tensor.n_bytes))
        for name, tensor in metadata.tensors.items()
    ]
    _summary(path, rows, tensors)
    if list_tensors:
        _list(tensors)
    return 0


def _safetensors(path: Path) -> list[tuple[str, str, list[int], int]]:
    """Name, type, shape and bytes of each tensor, from the file's header alone."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [
            (name, entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, MemoryError, OverflowError) as error:
        raise ModelLoadError(f"inspect: {path}: not a safetensors file ({error})") from error


def _summary(path: Path, rows: list[tuple[str, str]], tensors: list[tuple[str, str, list[int], int]]) -> None:
    table = Table(title=Text(str(path)), title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, Text(value))
    if tensors:
        parameters = sum(_product(shape) for _, _, shape, _ in tensors)
        kinds = Counter(kind for _, kind, _, _ in tensors)
        table.add_section()
        table.add_row("parameters", f"{parameters:,}")
        table.add_row("tensors", Text(", ".join(f"{count} {kind}" for kind, count in kinds.most_common())))
        table.add_row("bytes", format_bytes(sum(size for *_, size in tensors)))
    out.print(table)


def _tokenizer(path: Path) -> None:
    from flexcore.tokenizer import Tokenizer

    if not (path / "tokenizer.json").is_file():
        out.print("no tokenizer.json", style="yellow")
        return
    tokenizer = Tokenizer(path)
    ends = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.eos_token_ids()]
    template = "with" if tokenizer.chat_template else "without"
    out.print(
        f"tokenizer: {tokenizer.vocab_size:,} tokens, ends with {' '.join(ends) or '-'}, {template} chat template",
        markup=False,
    )


def _list(tensors: list[tuple[str, str, list[int], int]]) -> None:
    table = Table("tensor", "type", "shape", "bytes")
    for name, kind, shape, size in tensors:
        table.add_row(Text(name), Text(kind), "x".join(map(str, shape)), format_bytes(size))
    out.print(table)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
