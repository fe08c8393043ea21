"""fc.Engine: the compiled engine, with a model argument that may also be a .gguf file or a hub name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from flexcore import _core
from flexcore._core import EngineConfig, MemoryPlan, ParallelRates
from flexcore.adapters import AdapterConfig
from flexcore.models import ModelPath, resolve_model


class Engine(_core.Engine):
    """Serves and finetunes one model.

    `model` is a Hugging Face directory (config.json, *.safetensors, tokenizer.json), a .gguf file (converted once, kept
    in $FLEXCORE_CACHE) or a name on the Hugging Face hub. `progress(done, total)` follows a conversion. Raises
    ModelLoadError, Unsupported, InvalidArgument, OutOfMemory. Calls from several threads queue up.
    """

    def __init__(
        self,
        model: ModelPath,
        config: EngineConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model_directory: Path = resolve_model(model, progress)
        super().__init__(self.model_directory, config)

    def __repr__(self) -> str:
        return f"Engine({str(self.model_directory)!r})"


def plan(
    model: ModelPath,
    config: EngineConfig | None = None,
    lora: AdapterConfig | None = None,
    sequence_length: int | None = None,
    tensor_parallel_size: int = 1,
    sequence_parallel: bool = False,
    rates: ParallelRates | None = None,
) -> MemoryPlan:
    """The memory table of an engine on `model` finetuning with `lora`, without loading weights.

    `lora` may be the configuration of another method too.

    `sequence_length` is by default 1,024, or the engine's longest sequence if that is shorter. With a
    `tensor_parallel_size` above 1, `MemoryPlan.parallel` says how the model and its adapters would be divided: a plan,
    checked by simulation; an engine runs on one device. Raises Unsupported where the model does not divide.
    """
    directory = resolve_model(model)
    if sequence_length is None:
        sequence_length = min(1024, _longest_sequence(directory, config if config is not None else EngineConfig()))
    return _core.plan(directory, config, lora, sequence_length, tensor_parallel_size, sequence_parallel, rates)


def _longest_sequence(directory: Path, config: EngineConfig) -> int:
    """What the engine makes of max_model_len; a config.json that is not one is for _core.plan to refuse."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        model = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return min(config.max_model_len, int(model["max_position_embeddings"]))
    return config.max_model_len
