"""What the routes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexcore._core import InvalidArgument
from flexcore.server.errors import ApiError

if TYPE_CHECKING:
    from fastapi import Request

    from flexcore.server.finetuning import JobManager
    from flexcore.server.metrics import Metrics
    from flexcore.server.models import Models
    from flexcore.server.runner import EngineRunner
    from flexcore.server.store import Store
    from flexcore.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServerConfig:
    """Options of `flexcore serve` that are not the engine's."""

    served_names: tuple[str, ...]
    data_dir: Path
    api_keys: tuple[str, ...] = ()
    lora_modules: tuple[tuple[str, str], ...] = ()
    max_loras: int = 64
    max_waiting: int = 1024  # answers that may be unfinished at once
    max_body_bytes: int = 32 << 20
    max_file_bytes: int = 512 << 20
    max_dataset_bytes: int = 8 << 30  # of memory to read one
    max_finetune_jobs: int = 4  # that train at once; others wait in line
    allowed_origins: tuple[str, ...] = ()
    dashboard: bool = True  # the page at /


class ServerState:
    config: ServerConfig
    runner: EngineRunner
    store: Store
    models: Models
    jobs: JobManager
    metrics: Metrics

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.vocab_size, self.max_model_len = vocab_size, max_model_len

    def check_length(self, count: int, param: str) -> None:
        if count >= self.max_model_len:
            message = f"{param}: {count} tokens, and the model holds {self.max_model_len} with the answer"
            raise ApiError(400, message, param, "context_length_exceeded")
        if count == 0:
            raise ApiError(400, f"{param}: no tokens", param)

    def check_text(self, text: str, param: str) -> None:
        """Refuses what is too long in any case, before it is looked at token by token."""
        if len(text) > self.max_model_len * self.tokenizer.longest_token:
            message = f"{param}: {len(text)} characters are more than the model's {self.max_model_len} tokens"
            raise ApiError(400, message, param, "context_length_exceeded")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ApiError(400, f"{param}: token id {token}, wanted 0 to {self.vocab_size - 1}", param)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any] | None,
    ) -> list[int]:
        if reserved := set(variables or {}) & {"messages", "tools", "add_generation_prompt", "self"}:
            name = min(reserved)
            raise ApiError(400, f"chat_template_kwargs: {name!r} has a field of its own", "chat_template_kwargs")
        try:
            text = self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt, **(variables or {}))
            self.check_text(text, "messages")
            return self.tokenizer.encode(text, add_special_tokens=False)
        except InvalidArgument as error:
            raise ApiError(400, str(error), "messages") from None

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def token_name(self, token: int) -> str:
        """Its text, or as OpenAI writes what is no whole characters: "bytes:\\xe2\\x82"."""
        text = self.token_text(token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokenizer.token_bytes(token))


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
