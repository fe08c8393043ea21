"""fc.Engine: the compiled engine, with a model argument that may also be a .gguf file or a hub name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexcore import _core
from flexcore._core import EngineConfig, LoraConfig, MemoryPlan
from flexcore.models import ModelPath, resolve_model


class Engine(_core.Engine):
    """Serves and finetunes one model.

    `model` is a Hugging Face directory (config.json, *.safetensors, tokenizer.json), a .gguf file (converted once, kept
    in $FLEXCORE_CACHE) or a name on the Hugging Face hub. `progress(done, total)` follows a conversion. Raises
    ModelLoadError, Unsupported, InvalidArgument, OutOfMemory. Calls from several threads queue up, cancel excepted.
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
    lora: LoraConfig | None = None,
    sequence_length: int = 1024,
) -> MemoryPlan:
    """The memory table of an engine on `model` finetuning one sequence with `lora`, without loading weights."""
    return _core.plan(resolve_model(model), config, lora, sequence_length)
