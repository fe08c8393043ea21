"""What the demo leaves: the table at the end, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flexcore import SamplingParams, __version__
from flexcore.demo.session import ADAPTER, Session
from flexcore.demo.traffic import Latencies
from flexcore.llm import LLM
from flexcore.ui import format_bytes


@dataclass
class HeldOut:
    """Rows that are not trained on: how well are they predicted, and what is answered?"""

    rows: list[dict[str, Any]]
    samples: int = 3
    losses: dict[str, float] = field(default_factory=dict)  # "before", "after"
    answers: dict[str, list[str]] = field(default_factory=dict)

    def measure(self, when: str, llm: LLM, adapter: str | None) -> None:
        examples = llm.load_dataset(self.rows).examples
        total, count = 0.0, 0
        for example in examples:
            logprobs = llm.engine.score(example.input_ids, adapter)
            targets = np.asarray(example.labels[1:]) != -100
            total -= float(logprobs[targets].sum())
            count += int(targets.sum())
        self.losses[when] = total / max(count, 1)
        questions = [row["messages"][:-1] for row in self.rows[: self.samples]]
        outputs = llm.chat(questions, SamplingParams(max_tokens=40, temperature=0.0), adapter)
        self.answers[when] = [" ".join(output.text.split()) for output in outputs]


def summarize(session: Session, held_out: HeldOut, losses: Sequence[float]) -> dict[str, Any]:
    llm = session.llm
    model = llm.engine.model()
    elapsed = max(session.now.time, 1e-9)
    return {
        "flexcore": __version__,
        "model": {
            "name": llm.engine.model_directory.name,
            "parameters": model.num_parameters,
            "dtype": model.dtype,
            "device": model.device,
            "threads": model.num_threads,
        },
        "seconds": round(elapsed, 2),
        "steps": session.steps,
        "served": {
            "requests": len(session.visits),
            "answered": sum(visit.finished for visit in session.visits),
            "tokens": session.now.served,
            "tokens_per_s": round(session.now.served / elapsed, 2),
        },
        "trained": {
            "optimizer_steps": len(losses),
            "tokens": round(session.now.trained),
            "tokens_per_s": round(session.now.trained / elapsed, 2),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "losses": list(losses),
        },
        "latency": Latencies.of(session.visits).summary(llm.slo),
        "held_out": {
            "rows": len(held_out.rows),
            "loss_before": held_out.losses.get("before"),
            "loss_after": held_out.losses.get("after"),
            "samples": [
                {
                    "question": row["messages"][-2]["content"],
                    "wanted": row["messages"][-1]["content"],
                    **{when: answers[index] for when, answers in held_out.answers.items()},
                }
                for index, row in enumerate(held_out.rows[: held_out.samples])
            ],
        },
        "memory_peak": llm.engine.memory_peak(),
    }


def show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title="served and finetuned in the same iterations", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    served, trained = result["served"], result["trained"]
    table.add_row(
        "served",
        f"{served['tokens_per_s']:.1f} tokens/s",
        f"{served['answered']} of {served['requests']} requests answered",
    )
    steps = f"{trained['tokens']:,} tokens, {trained['optimizer_steps']} optimizer steps"
    table.add_row("trained", f"{trained['tokens_per_s']:.1f} tokens/s", steps)
    for key, name in (("ttft_ms", "TTFT p50 / p99"), ("tpot_ms", "TPOT p50 / p99")):
        _latency_row(table, name, result["latency"][key])
    table.add_row("training loss", _arrow(trained["loss_first"], trained["loss_last"]), "first -> last optimizer step")
    held_out = result["held_out"]
    loss = _arrow(held_out["loss_before"], held_out["loss_after"])
    table.add_row("held-out loss", loss, f"{held_out['rows']} functions it was not trained on")
    peak = ", ".join(f"{name} {format_bytes(count)}" for name, count in result["memory_peak"].items() if count)
    console.print(Group(table, Text(f"peak memory: {peak}", style="dim")))
    for sample in held_out["samples"]:
        if "after" in sample:
            console.print(_sample(sample))


def _latency_row(table: Table, name: str, latency: dict[str, Any]) -> None:
    if latency["p50"] is None:
        table.add_row(name, "-", "no request got that far")
        return
    text = f"objective {latency['objective']:.0f} ms, held by {latency['within']:.0%}"
    table.add_row(name, f"{latency['p50']:.0f} / {latency['p99']:.0f} ms", text)


def _arrow(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None else f"{first:.2f} -> {last:.2f}"


def _sample(sample: dict[str, str]) -> Panel:
    lines = Table.grid(padding=(0, 2))
    lines.add_row(Text("before", "dim"), Text(sample.get("before", "")))
    lines.add_row(Text("after", "bold green"), Text(sample["after"], "green"))
    lines.add_row(Text("author", "dim"), Text(sample["wanted"], "dim"))
    title = Text(sample["question"], "bold")
    return Panel(lines, title=title, title_align="left", subtitle=f"{ADAPTER} adapter", subtitle_align="right")
