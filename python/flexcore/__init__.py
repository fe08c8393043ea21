"""flexcore: serve a language model and finetune adapters on the same weights, in the same iterations."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexcore._core import (
    SLO,
    AdapterInfo,
    BottleneckConfig,
    DeviceError,
    EngineConfig,
    Error,
    Example,
    FinetuneConfig,
    FinetuneEvent,
    IA3Config,
    InvalidArgument,
    JobInfo,
    JobSnapshot,
    LoraConfig,
    MemoryPlan,
    ModelInfo,
    ModelLoadError,
    OutOfMemory,
    ParallelCandidate,
    ParallelPlan,
    ParallelRates,
    ParallelSite,
    PlannedTensor,
    PrefixTuningConfig,
    PromptTuningConfig,
    SamplingParams,
    SimulatedJob,
    SimulatedRequest,
    Simulation,
    SimulationConfig,
    StepReport,
    TokenEvent,
    Unsupported,
    __version__,
    simulate,
)
from flexcore.engine import Engine, plan
from flexcore.records import refuse_unknown_fields

if TYPE_CHECKING:
    from flexcore import datasets
    from flexcore.llm import LLM, RequestOutput
    from flexcore.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "SLO",
    "AdapterInfo",
    "BottleneckConfig",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "Error",
    "Example",
    "FinetuneConfig",
    "FinetuneEvent",
    "IA3Config",
    "InvalidArgument",
    "JobInfo",
    "JobSnapshot",
    "LoraConfig",
    "MemoryPlan",
    "ModelInfo",
    "ModelLoadError",
    "OutOfMemory",
    "ParallelCandidate",
    "ParallelPlan",
    "ParallelRates",
    "ParallelSite",
    "PlannedTensor",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "RequestOutput",
    "SamplingParams",
    "SimulatedJob",
    "SimulatedRequest",
    "Simulation",
    "SimulationConfig",
    "StepReport",
    "TokenEvent",
    "Tokenizer",
    "Unsupported",
    "__version__",
    "datasets",
    "ops",
    "plan",
    "simulate",
]

for _record in (
    SLO,
    BottleneckConfig,
    EngineConfig,
    Example,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    ParallelRates,
    PrefixTuningConfig,
    PromptTuningConfig,
    SamplingParams,
    SimulatedJob,
    SimulatedRequest,
    SimulationConfig,
):
    refuse_unknown_fields(_record)

# Imported on first use: tokenizers, jinja2 and the array module are not everybody's business.
_LAZY = {
    "LLM": "flexcore.llm",
    "RequestOutput": "flexcore.llm",
    "Tokenizer": "flexcore.tokenizer",
    "datasets": "flexcore.datasets",
    "ops": "flexcore.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flexcore' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name].endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
