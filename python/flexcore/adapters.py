"""Configurations of adapters by PEFT's name of their method."""

from __future__ import annotations

from typing import Any, TypeAlias

from flexcore._core import (
    BottleneckConfig,
    IA3Config,
    InvalidArgument,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

AdapterConfig: TypeAlias = LoraConfig | IA3Config | BottleneckConfig | PromptTuningConfig | PrefixTuningConfig

PEFT_TYPES: dict[str, type[AdapterConfig]] = {
    "LORA": LoraConfig,
    "IA3": IA3Config,
    "BOTTLENECK": BottleneckConfig,
    "PROMPT_TUNING": PromptTuningConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
}


def adapter_config(peft_type: str, **fields: Any) -> AdapterConfig:
    """The configuration of a method, by its name in any case. Raises InvalidArgument for other names and fields."""
    method = PEFT_TYPES.get(peft_type.upper().replace("-", "_"))
    if method is None:
        raise InvalidArgument(f"peft_type: got {peft_type!r}, wanted one of {', '.join(PEFT_TYPES)}")
    return method(**fields)
