"""Request bodies. A field that is not here is an error that names it; what only other servers act on is accepted and
has no effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexcore import SamplingParams
from flexcore.server.errors import ApiError

MAX_STOP = 16
MAX_TOP_LOGPROBS = 20
_OPTIONAL = [
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "n", "seed", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _of_whole_characters(cls, data: Any) -> Any:
        """JSON can hold half a surrogate pair, which neither a database nor an answer can."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if not (_is_whole(name) and _is_whole(value)):
                name = name.encode(errors="replace").decode()
                raise ApiError(400, f"{name}: half a surrogate pair, wanted whole characters", name)
        return data


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    elif isinstance(value, dict):
        return all(_is_whole(key) and _is_whole(item) for key, item in value.items())
    elif isinstance(value, list):
        return all(_is_whole(item) for item in value if not isinstance(item, int | float))
    return True


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # no effect


class Sampling(Body):
    """The fields that both forms of generation have."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    slo_class: str | None = None  # flexcore's: whose objective holds
    user: str | None = None  # no effect, as the rest
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """In the engine's form, which checks the ranges."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP or any(not text for text in stop):
            raise ApiError(400, f"stop: wanted at most {MAX_STOP} strings, none of them empty", "stop")
        optional = {name: value for name in _OPTIONAL if (value := getattr(self, name)) is not None}
        if optional.get("top_k") == -1:  # vLLM's way to say all
            optional["top_k"] = 0
        return SamplingParams(
            max_tokens=max_tokens,
            stop=stop,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=_bias(self.logit_bias),
            **optional,
        )


class CompletionRequest(Sampling):
    prompt: Any = Field(description="text or token ids, or a list of either")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None


class ChatRequest(Sampling):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # no effect
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    reasoning_effort: str | None = None  # no effect
    verbosity: str | None = None  # no effect


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


class LoadAdapterRequest(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    lora_name: str


def _bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError:
        raise ApiError(400, "logit_bias: wanted token ids as keys", "logit_bias") from None


def messages_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content in parts becomes text; a template then sees a string or nothing."""
    out = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool", "function"):
            wanted = "system, developer, user, assistant or tool"
            raise ApiError(400, f"{where}.role: got {role!r}, wanted {wanted}", f"{where}.role")
        content = message.get("content")
        if isinstance(content, list):
            texts = []
            for part in content:
                if not (isinstance(part, dict) and part.get("type") in ("text", "refusal")):
                    raise ApiError(400, f"{where}.content: this model reads text parts only", f"{where}.content")
                texts.append(part.get("text") or part.get("refusal") or "")
            if not all(isinstance(text, str) for text in texts):
                raise ApiError(400, f"{where}.content: wanted text as a string", f"{where}.content")
            content = "".join(texts)
        elif content is not None and not isinstance(content, str):
            raise ApiError(400, f"{where}.content: wanted a string or a list of parts", f"{where}.content")
        if content is None and role != "assistant":
            raise ApiError(400, f"{where}.content: missing", f"{where}.content")
        out.append({**message, "role": "system" if role == "developer" else role, "content": content or ""})
    return out
