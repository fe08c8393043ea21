"""flexcore train DATA --model MODEL --output-dir DIR"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexcore import Error, FinetuneEvent, InvalidArgument, ModelLoadError
from flexcore.cli import options
from flexcore.cli.console import err, load_llm, out
from flexcore.ui import chart, format_duration, sparkline

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flexcore.llm import LLM

_QUIET_SECONDS = 5.0  # between lines when not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help=".jsonl or .json (also .gz): chat, prompt/completion, Alpaca, ShareGPT, tokens")
    parser.add_argument("--model", help="directory, .gguf file or hub name")
    parser.add_argument("--output-dir", required=True, help="PEFT directory to write")
    parser.add_argument("--adapter-name", help="name in the engine (default: the directory's)")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT_DIR/checkpoint, as it was begun")
    parser.add_argument("--save-steps", type=int, default=0, metavar="N", help="checkpoint every N optimizer steps")
    parser.add_argument("--max-length", "--cutoff-len", type=int, metavar="TOKENS", help="cut longer rows")
    parser.add_argument("--max-samples", type=options.positive, metavar="N", help="use the first N examples")
    options.add_finetune(parser)
    options.add_adapter(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output_dir)
    checkpoint = output / "checkpoint"
    if args.resume:
        _check_resume(args, checkpoint)
    elif checkpoint.is_dir():
        message = f"{checkpoint} is of a run that was stopped: --resume goes on from it; this one begins anew"
        err.print(message, markup=False, soft_wrap=True)
    llm = load_llm(options.model_of(args), options.engine_config(args))
    dataset = llm.load_dataset(args.data, args.max_length)
    err.print(f"{args.data}: {dataset.summary()}", markup=False, soft_wrap=True)
    examples = dataset.examples[: args.max_samples]
    if args.resume:
        job = llm.engine.resume_finetune(checkpoint, examples)
        err.print(f"goes on after step {llm.engine.job(job).step}", markup=False, soft_wrap=True)
    else:
        name = args.adapter_name or output.resolve().name
        config = options.finetune_config(args)
        llm.engine.create_adapter(name, options.adapter_of(args), config.seed)
        job = llm.engine.finetune(name, examples, config)
    trainer = _Trainer(llm, job, output, args.save_steps)
    try:
        trainer.run()
    except KeyboardInterrupt:
        llm.engine.save_checkpoint(job, checkpoint)
        err.print(f"stopped; the same command with --resume goes on from {checkpoint}", markup=False, soft_wrap=True)
        return 130
    llm.engine.save_adapter(llm.engine.job(job).adapter, output)
    if checkpoint.is_dir():  # of a run that has ended: nothing to resume
        shutil.rmtree(checkpoint)
    trainer.report()
    return 0


def _check_resume(args: argparse.Namespace, checkpoint: Path) -> None:
    """A run goes on with the options of its beginning; others on the command line would be ignored."""
    if not checkpoint.is_dir():
        raise InvalidArgument(f"--resume: {checkpoint} does not exist")
    state, adapter = (_read_object(checkpoint / name) for name in ("trainer_state.json", "adapter_config.json"))
    name = {"adapter": args.adapter_name} if args.adapter_name is not None else {}
    differences = [
        f"{option}: got {given[field]!r}, the run has {stored.get(field)!r}"
        for fields, given, stored in (
            (options.FINETUNE, options.given_finetune(args), state.get("config", {})),
            (options.ADAPTER, options.given_adapter(args), adapter),
            ({"--adapter-name": "adapter"}, name, state),
        )
        for option, field in fields.items()
        if field in given and _unordered(given[field]) != _unordered(stored.get(field))
    ]
    if differences:
        raise InvalidArgument(
            f"--resume: {checkpoint} was begun with other options; leave them out, or train anew without --resume: "
            + "; ".join(differences)
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"--resume: {path}: {error}") from error
    return value if isinstance(value, dict) else {}


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


class _Trainer:
    """Steps the engine to the end of one job; draws progress, keeps the log, writes checkpoints."""

    def __init__(self, llm: LLM, job: int, output: Path, save_steps: int) -> None:
        self._llm, self._job, self._output, self._save_steps = llm, job, output, save_steps
        self._losses: list[float] = []
        self._start = time.perf_counter()
        self._tokens = 0
        output.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        first = self._llm.engine.job(self._job)
        path = self._output / "training_log.jsonl"
        kept = _log_until(path, first.step)
        # A line at a time: a killed run leaves the steps before its last checkpoint.
        with path.open("w", encoding="utf-8", buffering=1) as log, _progress() as show:
            log.writelines(kept)
            while (info := self._llm.engine.job(self._job)).status in ("queued", "running"):
                report = self._llm.step()
                for event in report.finetune:
                    if event.job_id == self._job and event.target_tokens:
                        self._losses.append(event.loss)
                        log.write(json.dumps(self._line(event)) + "\n")
                        self._checkpoint(event)
                self._tokens = self._llm.engine.job(self._job).trained_tokens - first.trained_tokens
                show(self._state())
        if info.status == "failed":
            raise Error(f"job on {info.adapter!r} failed: {info.error}")

    def _line(self, event: FinetuneEvent) -> dict[str, Any]:
        return {
            "step": event.step,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "target_tokens": event.target_tokens,
            "seconds": round(time.perf_counter() - self._start, 3),
        }

    def _checkpoint(self, event: FinetuneEvent) -> None:
        if event.status == "running" and self._save_steps and event.step % self._save_steps == 0:
            self._llm.engine.save_checkpoint(self._job, self._output / "checkpoint")

    def _state(self) -> dict[str, Any]:
        info = self._llm.engine.job(self._job)
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        loss = f"{self._losses[-1]:.3f}" if self._losses else "-"
        return {"step": info.step, "total": info.total_steps, "loss": loss, "rate": rate, "epoch": info.epoch}

    def report(self) -> None:
        elapsed = time.perf_counter() - self._start
        losses = self._losses or [float("nan")]
        out.print(
            f"{len(self._losses)} steps in {format_duration(elapsed)}, {self._tokens / max(elapsed, 1e-9):.0f} "
            f"tokens/s, loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        )
        if out.is_terminal and len(self._losses) > 2:
            out.print("\n".join(chart(self._losses, width=60, height=8)), style="cyan", markup=False)
        elif len(self._losses) > 2:
            out.print(sparkline(self._losses), markup=False)
        out.print(f"adapter: {self._output}", markup=False, soft_wrap=True)


def _log_until(path: Path, step: int) -> list[str]:
    """Lines of a log up to a checkpoint's step; those after it will be made again."""
    if not step or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


@contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    if not err.is_terminal:
        with nullcontext():
            yield _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("loss {task.fields[loss]}  {task.fields[rate]:.0f} tokens/s")
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        text,
        TimeRemainingColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, loss="-", rate=0.0)

        def show(state: dict[str, Any]) -> None:
            bar.update(
                task, completed=state["step"], total=state["total"] or None, loss=state["loss"], rate=state["rate"]
            )

        yield show


def _lines() -> Callable[[dict[str, Any]], None]:
    """A line now and then, for logs."""
    last = time.perf_counter()

    def show(state: dict[str, Any]) -> None:
        nonlocal last
        if time.perf_counter() - last >= _QUIET_SECONDS:
            last = time.perf_counter()
            err.print(
                f"step {state['step']}/{state['total']} loss {state['loss']} {state['rate']:.0f} tokens/s", markup=False
            )

    return show
