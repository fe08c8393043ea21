"""Types of the compiled module of array ops; a test holds this file against the module. Outputs are arguments."""

from flexcore.ops._arrays import Array

def set_num_threads(num_threads: int) -> None: ...
def num_threads() -> int: ...
def linear(x: Array, weight: Array, bias: Array | None, y: Array) -> None: ...
def linear_backward(grad_y: Array, weight: Array, grad_x: Array) -> None: ...
def lora_forward(
    x: Array,
    weight: Array | None,
    lora_a: Array,
    lora_b: Array,
    scaling: float | Array,
    indptr: Array | None,
    adapter_ids: Array | None,
    y: Array,
) -> None: ...
def lora_backward(
    grad_y: Array,
    x: Array,
    weight: Array | None,
    lora_a: Array,
    lora_b: Array,
    scaling: float | Array,
    indptr: Array | None,
    adapter_ids: Array | None,
    grad_x: Array,
    grad_a: Array,
    grad_b: Array,
) -> None: ...
def rms_norm(x: Array, weight: Array, eps: float, y: Array) -> None: ...
def rms_norm_backward(grad_y: Array, x: Array, weight: Array, eps: float, grad_x: Array) -> None: ...
def rotary(x: Array, positions: Array, cos: Array, sin: Array, inverse: bool, y: Array) -> None: ...
def silu_mul(gate: Array, up: Array, y: Array) -> None: ...
def silu_mul_backward(
    grad_y: Array, gate: Array, up: Array, grad_gate: Array | None, grad_up: Array | None
) -> None: ...
def kv_write(
    k: Array, v: Array, k_pages: Array, v_pages: Array, block_tables: Array, indptr: Array, positions: Array
) -> None: ...
def attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    block_tables: Array,
    indptr: Array,
    positions: Array,
    scale: float,
    sliding_window: int,
    y: Array,
    lse: Array,
) -> None: ...
def attention_backward_window(
    grad_y: Array,
    q: Array,
    y: Array,
    lse: Array,
    k_pages: Array,
    v_pages: Array,
    block_table: Array,
    position: int,
    grad_k: Array,
    grad_v: Array,
    scale: float,
    sliding_window: int,
    grad_q: Array,
    grad_k_rows: Array,
    grad_v_rows: Array,
) -> None: ...
def linear_cross_entropy(
    hidden: Array, weight: Array, labels: Array, grad_scale: Array | None, loss: Array, grad_hidden: Array | None
) -> None: ...
def adamw(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None: ...
def sample(
    logits: Array,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    counter: int,
    tokens: Array,
    logprobs: Array,
) -> None: ...
