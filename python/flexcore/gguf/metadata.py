"""Reading a GGUF header: keys, tokens and tensors, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexcore._core import ModelLoadError, Unsupported

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class Metadata:
    """The header of one GGUF file; tensors stay memory-mapped."""

    def __init__(self, path: str | Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise Unsupported("GGUF files need the gguf package: pip install gguf") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelLoadError(f"{self.path}: no such file")
        try:
            self._reader = GGUFReader(self.path)
        except Exception as error:  # the reader raises what numpy and struct raise
            raise ModelLoadError(f"{self.path}: not a whole GGUF file ({error})") from error
        self._values: dict[str, Any] = {}  # decoding a token list takes a while
        self.architecture = str(self.get("general.architecture", ""))
        if self.architecture not in ARCHITECTURES:
            raise Unsupported(
                f"{self.path}: architecture {self.architecture!r}; GGUF files are read for {', '.join(ARCHITECTURES)}"
            )
        self.tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self._values:
            field = self._reader.get_field(key)
            self._values[key] = None if field is None else field.contents()
        value = self._values[key]
        return default if value is None else value

    def of_model(self, key: str, default: Any = None) -> Any:
        """The value under `<architecture>.<key>`."""
        return self.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.of_model(key)
        if value is None:
            raise ModelLoadError(f"{self.path}: the key {self.architecture}.{key} is missing")
        return value

    def token_id(self, role: str) -> int | None:
        """Id of a special token: "bos", "eos", "eot", "eom", "unknown", "padding"."""
        value = self.get(f"tokenizer.ggml.{role}_token_id")
        return None if value is None else int(value)
