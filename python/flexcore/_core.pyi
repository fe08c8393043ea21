"""Types of the compiled engine module; a test holds this file against the module."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__version__: str

_Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
_Path: TypeAlias = str | os.PathLike[str]
_AdapterConfig: TypeAlias = "LoraConfig | IA3Config | BottleneckConfig | PromptTuningConfig | PrefixTuningConfig"

class Error(RuntimeError): ...
class InvalidArgument(Error, ValueError): ...
class Unsupported(Error): ...
class OutOfMemory(Error, MemoryError): ...
class DeviceError(Error): ...
class ModelLoadError(Error): ...

class SLO:
    _fields: tuple[str, ...]
    tpot_ms: float
    ttft_ms: float
    attainment: float
    def __init__(self, tpot_ms: float = 100.0, ttft_ms: float = 2000.0, attainment: float = 0.99) -> None: ...

class EngineConfig:
    _fields: tuple[str, ...]
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_memory_bytes: int | None
    swap_space_bytes: int | None
    finetune_memory_bytes: int | None
    finetune_activations: str
    enable_prefix_caching: bool
    enforce_eager: bool
    num_threads: int
    seed: int
    slo: SLO
    slo_classes: dict[str, SLO]
    policy: str
    min_finetune_share: float
    quantization: str | None
    quantization_group_size: int
    def __init__(
        self,
        device: str = "auto",
        dtype: str = "bfloat16",
        max_model_len: int = 2048,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        kv_cache_memory_bytes: int | None = None,
        swap_space_bytes: int | None = None,
        finetune_memory_bytes: int | None = None,
        finetune_activations: str = "exact",
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        num_threads: int = 0,
        seed: int = 0,
        slo: SLO = ...,
        slo_classes: Mapping[str, SLO] = ...,
        policy: str = "hybrid",
        min_finetune_share: float = 0.02,
        quantization: str | None = None,
        quantization_group_size: int = 64,
    ) -> None: ...

class SamplingParams:
    _fields: tuple[str, ...]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    @property
    def stop(self) -> list[str]: ...
    @stop.setter
    def stop(self, value: str | Sequence[str]) -> None: ...
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None
    n: int
    logprobs: int | None
    prompt_logprobs: bool
    logit_bias: dict[int, float]
    def __init__(
        self,
        max_tokens: int = 16,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = [],
        stop_token_ids: _Ids = [],
        ignore_eos: bool = False,
        seed: int | None = None,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        logit_bias: Mapping[int, float] = {},
    ) -> None: ...

class LoraConfig:
    _fields: tuple[str, ...]
    r: int
    lora_alpha: float
    @property
    def target_modules(self) -> str | list[str]: ...
    @target_modules.setter
    def target_modules(self, value: str | Sequence[str]) -> None: ...
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    lora_dropout: float
    modules_to_save: list[str]
    use_dora: bool
    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 8.0,
        target_modules: str | Sequence[str] = "all-linear",
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] = {},
        alpha_pattern: Mapping[str, float] = {},
        lora_dropout: float = 0.0,
        modules_to_save: Sequence[str] = [],
        use_dora: bool = False,
    ) -> None: ...

class IA3Config:
    _fields: tuple[str, ...]
    @property
    def target_modules(self) -> str | list[str]: ...
    @target_modules.setter
    def target_modules(self, value: str | Sequence[str]) -> None: ...
    @property
    def feedforward_modules(self) -> str | list[str]: ...
    @feedforward_modules.setter
    def feedforward_modules(self, value: str | Sequence[str]) -> None: ...
    def __init__(
        self,
        target_modules: str | Sequence[str] = ["k_proj", "v_proj", "down_proj"],
        feedforward_modules: str | Sequence[str] = ["down_proj"],
    ) -> None: ...

class BottleneckConfig:
    _fields: tuple[str, ...]
    bottleneck_size: int
    non_linearity: str
    scaling: float
    use_parallel_adapter: bool
    @property
    def target_modules(self) -> str | list[str]: ...
    @target_modules.setter
    def target_modules(self, value: str | Sequence[str]) -> None: ...
    def __init__(
        self,
        bottleneck_size: int = 256,
        non_linearity: str = "tanh",
        scaling: float = 1.0,
        use_parallel_adapter: bool = False,
        target_modules: str | Sequence[str] = ["o_proj", "down_proj"],
    ) -> None: ...

class PromptTuningConfig:
    _fields: tuple[str, ...]
    num_virtual_tokens: int
    init_token_ids: list[int]
    token_dim: int
    num_layers: int
    num_attention_heads: int
    def __init__(
        self,
        num_virtual_tokens: int = 20,
        init_token_ids: _Ids = [],
        token_dim: int = 0,
        num_layers: int = 0,
        num_attention_heads: int = 0,
    ) -> None: ...

class PrefixTuningConfig:
    _fields: tuple[str, ...]
    num_virtual_tokens: int
    token_dim: int
    num_layers: int
    num_attention_heads: int
    def __init__(
        self,
        num_virtual_tokens: int = 20,
        token_dim: int = 0,
        num_layers: int = 0,
        num_attention_heads: int = 0,
    ) -> None: ...

class Example:
    _fields: tuple[str, ...]
    input_ids: list[int]
    labels: list[int]
    def __init__(self, input_ids: _Ids = [], labels: _Ids = []) -> None: ...

class FinetuneConfig:
    _fields: tuple[str, ...]
    num_epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    lr_scheduler: str
    warmup_ratio: float
    shuffle: bool
    seed: int
    window_tokens: int | None
    backward_window_tokens: int | None
    weight: float
    def __init__(
        self,
        num_epochs: int = 1,
        batch_size: int = 8,
        learning_rate: float = 2e-4,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
        lr_scheduler: str = "constant",
        warmup_ratio: float = 0.0,
        shuffle: bool = True,
        seed: int = 0,
        window_tokens: int | None = None,
        backward_window_tokens: int | None = None,
        weight: float = 1.0,
    ) -> None: ...

class TokenEvent:
    _fields: tuple[str, ...]
    @property
    def request_id(self) -> int: ...
    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def top_logprobs(self) -> list[tuple[int, float]]: ...
    @property
    def prompt_logprobs(self) -> list[float]: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def ttft_ms(self) -> float: ...
    @property
    def error(self) -> str: ...

class FinetuneEvent:
    _fields: tuple[str, ...]
    @property
    def job_id(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def target_tokens(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def status(self) -> str: ...

class StepReport:
    _fields: tuple[str, ...]
    @property
    def outputs(self) -> list[TokenEvent]: ...
    @property
    def finetune(self) -> list[FinetuneEvent]: ...
    @property
    def num_decode_tokens(self) -> int: ...
    @property
    def num_prefill_tokens(self) -> int: ...
    @property
    def num_finetune_forward_tokens(self) -> int: ...
    @property
    def num_finetune_backward_tokens(self) -> int: ...
    @property
    def num_backward_units(self) -> int: ...
    @property
    def predicted_ms(self) -> float: ...
    @property
    def predicted_upper_ms(self) -> float: ...
    @property
    def elapsed_ms(self) -> float: ...
    @property
    def explain(self) -> str: ...

class AdapterInfo:
    _fields: tuple[str, ...]
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def peft_type(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def target_modules(self) -> list[str]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def training(self) -> bool: ...

class JobInfo:
    _fields: tuple[str, ...]
    @property
    def id(self) -> int: ...
    @property
    def adapter(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def trained_tokens(self) -> int: ...
    @property
    def error(self) -> str: ...

class ModelInfo:
    _fields: tuple[str, ...]
    @property
    def architecture(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def quantization_group_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_threads(self) -> int: ...

class ParallelRates:
    _fields: tuple[str, ...]
    flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    collective_seconds: float
    def __init__(
        self,
        flops_per_second: float = 989.4e12,
        memory_bytes_per_second: float = 3.35e12,
        link_bytes_per_second: float = 450e9,
        collective_seconds: float = 1e-05,
    ) -> None: ...

class ParallelCandidate:
    _fields: tuple[str, ...]
    @property
    def plan(self) -> str: ...
    @property
    def forward_us(self) -> float: ...
    @property
    def backward_us(self) -> float: ...
    @property
    def step_us(self) -> float: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def memory_bytes(self) -> int: ...

class ParallelSite:
    _fields: tuple[str, ...]
    @property
    def module(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def weight(self) -> str: ...
    @property
    def x(self) -> str: ...
    @property
    def y(self) -> str: ...
    @property
    def candidates(self) -> int: ...
    @property
    def equal(self) -> int: ...
    @property
    def plan(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def forward_bytes_per_token(self) -> float: ...
    @property
    def backward_bytes_per_token(self) -> float: ...
    @property
    def step_bytes(self) -> int: ...
    @property
    def parameter_bytes(self) -> int: ...
    @property
    def kept(self) -> list[ParallelCandidate]: ...

class ParallelPlan:
    _fields: tuple[str, ...]
    @property
    def tensor_parallel_size(self) -> int: ...
    @property
    def sequence_parallel(self) -> bool: ...
    @property
    def forward_bytes_per_token(self) -> float: ...
    @property
    def backward_bytes_per_token(self) -> float: ...
    @property
    def weights(self) -> int: ...
    @property
    def kv_pages(self) -> int: ...
    @property
    def saved_activations(self) -> int: ...
    @property
    def adapters(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def optimizer(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def sites(self) -> list[ParallelSite]: ...

class PlannedTensor:
    _fields: tuple[str, ...]
    @property
    def name(self) -> str: ...
    @property
    def choice(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def bytes_per_token(self) -> int: ...

class MemoryPlan:
    _fields: tuple[str, ...]
    @property
    def weights(self) -> int: ...
    @property
    def kv_pages(self) -> int: ...
    @property
    def saved_activations(self) -> int: ...
    @property
    def adapters(self) -> int: ...
    @property
    def gradients(self) -> int: ...
    @property
    def optimizer(self) -> int: ...
    @property
    def workspace(self) -> int: ...
    @property
    def offloaded_activations(self) -> int: ...
    @property
    def swap_space(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def tokens_in_flight(self) -> int: ...
    @property
    def max_sequence_length(self) -> int: ...
    @property
    def saved_bytes_per_token_per_layer(self) -> int: ...
    @property
    def unpruned_bytes_per_token_per_layer(self) -> int: ...
    @property
    def tensors(self) -> list[PlannedTensor]: ...
    @property
    def parallel(self) -> ParallelPlan | None: ...
    def describe(self) -> str: ...

def plan(
    model: _Path,
    config: EngineConfig | None = None,
    lora: _AdapterConfig | None = None,
    sequence_length: int = 1024,
    tensor_parallel_size: int = 1,
    sequence_parallel: bool = False,
    rates: ParallelRates | None = None,
) -> MemoryPlan: ...

class SimulatedRequest:
    _fields: tuple[str, ...]
    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str
    def __init__(
        self, arrival_ms: float = 0.0, prompt_tokens: int = 1, output_tokens: int = 1, slo_class: str = ""
    ) -> None: ...

class SimulatedJob:
    _fields: tuple[str, ...]
    lengths: list[int]
    batch_size: int
    weight: float
    def __init__(self, lengths: Sequence[int] = ..., batch_size: int = 8, weight: float = 1.0) -> None: ...

class SimulationConfig:
    _fields: tuple[str, ...]
    engine: EngineConfig
    num_layers: int
    num_blocks: int
    max_finetune_tokens_in_flight: int
    step_time_ms: dict[str, float]
    noise: float
    stall_share: float
    stall_ms: float
    between_steps_ms: float
    optimizer_ms: float
    duration_ms: float
    def __init__(
        self,
        engine: EngineConfig = ...,
        num_layers: int = 30,
        num_blocks: int = 4096,
        max_finetune_tokens_in_flight: int = 1024,
        step_time_ms: Mapping[str, float] = ...,
        noise: float = 0.0,
        stall_share: float = 0.0,
        stall_ms: float = 0.0,
        between_steps_ms: float = 0.0,
        optimizer_ms: float = 0.0,
        duration_ms: float = 60_000.0,
    ) -> None: ...

class Simulation:
    _fields: tuple[str, ...]
    @property
    def answers(self) -> dict[str, Any]: ...
    @property
    def steps(self) -> dict[str, NDArray[Any]]: ...
    @property
    def end_ms(self) -> float: ...
    @property
    def finetune_tokens(self) -> float: ...
    @property
    def backward_layer_tokens(self) -> float: ...
    @property
    def trained_tokens(self) -> float: ...
    @property
    def optimizer_steps(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...

def simulate(
    requests: Sequence[SimulatedRequest],
    jobs: Sequence[SimulatedJob] = (),
    config: SimulationConfig | None = None,
) -> Simulation: ...

class JobSnapshot:
    @property
    def step(self) -> int: ...
    def save_checkpoint(self, directory: _Path) -> None: ...
    def save_adapter(self, directory: _Path) -> None: ...

class Engine:
    def __init__(self, model: _Path, config: EngineConfig | None = None) -> None: ...
    def submit(
        self,
        prompt_token_ids: _Ids,
        sampling: SamplingParams | None = None,
        adapter: str | None = None,
        slo_class: str | None = None,
        waited_ms: float = 0.0,
    ) -> int: ...
    def submit_batch(
        self,
        prompts: Sequence[_Ids],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        slo_class: str | Sequence[str | None] | None = None,
    ) -> list[int]: ...
    def step(self) -> StepReport: ...
    def cancel(self, request_id: int) -> bool: ...
    def has_work(self) -> bool: ...
    def create_adapter(self, name: str, config: _AdapterConfig | None = None, seed: int = 0) -> None: ...
    def load_adapter(self, name: str, directory: _Path) -> None: ...
    def save_adapter(self, name: str, directory: _Path) -> None: ...
    def adapters(self) -> list[AdapterInfo]: ...
    def unload_adapter(self, name: str) -> None: ...
    def finetune(
        self,
        adapter: str,
        examples: Sequence[Example | Mapping[str, _Ids]],
        config: FinetuneConfig | None = None,
    ) -> int: ...
    def resume_finetune(self, directory: _Path, examples: Sequence[Example | Mapping[str, _Ids]]) -> int: ...
    def save_checkpoint(self, job_id: int, directory: _Path) -> None: ...
    def snapshot_job(self, job_id: int, optimizer: bool = True) -> JobSnapshot: ...
    def job(self, job_id: int) -> JobInfo: ...
    def jobs(self) -> list[JobInfo]: ...
    def pause_job(self, job_id: int) -> None: ...
    def resume_job(self, job_id: int) -> None: ...
    def cancel_job(self, job_id: int) -> None: ...
    def score(self, token_ids: _Ids, adapter: str | None = None) -> NDArray[np.float32]: ...
    def logits(self, token_ids: _Ids, adapter: str | None = None) -> NDArray[np.float32]: ...
    def loss_and_gradients(
        self,
        adapter: str,
        examples: Sequence[Example | Mapping[str, _Ids]],
        window_tokens: int | None = None,
        backward_window_tokens: int | None = None,
        dropout_seed: int | None = None,
    ) -> dict[str, Any]: ...
    def memory(self) -> dict[str, int]: ...
    def memory_peak(self) -> dict[str, int]: ...
    def stats(self) -> dict[str, float]: ...
    def model(self) -> ModelInfo: ...
    def set_slo(self, slo: SLO, slo_class: str | None = None) -> None: ...
    def set_policy(self, policy: str) -> None: ...
    def set_finetune_memory(self, bytes: int | None) -> None: ...
