"""What the settings of a job say: those of its row in the store."""

from __future__ import annotations

import math
from typing import Any

from flexcore.adapters import AdapterConfig, adapter_config

LEARNING_RATE = 2e-4  # times learning_rate_multiplier


def adapter_of(settings: dict[str, Any]) -> AdapterConfig:
    """The adapter that it trains: `peft`, or `lora` where that is none. Raises InvalidArgument."""
    return adapter_config(**(settings.get("peft") or {"peft_type": "LORA", **settings["lora"]}))


def virtual_tokens(settings: dict[str, Any]) -> int:
    """Positions that the adapter takes ahead of every sequence."""
    return getattr(adapter_of(settings), "num_virtual_tokens", 0)


def model_name(base: str, suffix: str | None, job: str) -> str:
    return f"ft:{base}:{suffix or ''}:{job.removeprefix('ftjob-')[:12]}"


def resolved(settings: dict[str, Any], num_examples: int) -> dict[str, Any]:
    """FinetuneConfig fields, with a number in the place of each "auto"."""
    auto = {
        "n_epochs": min(10, max(1, math.ceil(100 / num_examples))) if num_examples < 100 else 3,
        "batch_size": min(8, max(1, num_examples // 16)),
        "learning_rate_multiplier": 1.0,
    }
    chosen = {name: auto[name] if settings[name] == "auto" else settings[name] for name in auto}
    return {
        "num_epochs": chosen["n_epochs"],
        "batch_size": chosen["batch_size"],
        "learning_rate": LEARNING_RATE * chosen["learning_rate_multiplier"],
        **settings["training"],
    }
