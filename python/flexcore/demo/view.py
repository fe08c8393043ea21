"""The demo on a terminal: requests with their text, loss, rates, memory, and why each step is what it is."""

from __future__ import annotations

import textwrap
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexcore import ModelInfo
from flexcore.demo.session import Session
from flexcore.demo.traffic import Latencies, Visit
from flexcore.ui import chart, format_bytes, percentile

_FRAME = 0.12  # seconds between pictures
_LINE = 5.0  # seconds between lines where there is no terminal
_HEIGHT = 30
_LINES_A_VISIT = 3
_POOL_COLOURS = {
    "weights": "blue",
    "kv_pages": "cyan",
    "saved_activations": "magenta",
    "adapters": "green",
    "gradients": "yellow",
    "optimizer": "red",
    "workspace": "white",
}


class View:
    """Draws a session; a context manager whose `update` may be called after every step."""

    def __init__(self, console: Console, session: Session, duration: float) -> None:
        self._console, self._session, self._duration = console, session, duration
        self._model = session.llm.engine.model()
        self._name = session.llm.engine.model_directory.name.partition(".")[0]
        self._last = 0.0
        self._live: Live | None = None

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.update(self.picture(), refresh=True)
            self._live.stop()

    def update(self) -> None:
        now = time.perf_counter()
        if now - self._last < (_FRAME if self._live else _LINE):
            return
        self._last = now
        if self._live:
            self._live.update(self.picture(), refresh=True)
        else:
            self._console.print(self.line(), markup=False, soft_wrap=True)

    def line(self) -> str:
        session = self._session
        served, trained = session.rates()
        loss = f"{session.losses[-1]:.2f}" if session.losses else "-"
        return (
            f"[{session.clock():3.0f} s] served {session.now.served} tokens ({served:.0f}/s), trained "
            f"{session.now.trained:.0f} ({trained:.0f}/s), optimizer step {len(session.losses)}, loss {loss}, "
            f"{len(session.running())} running | {session.last.explain if session.last else ''}"
        )

    def picture(self) -> RenderableType:
        height = max(16, min(_HEIGHT, self._console.height - 1))
        layout = Layout()
        layout.split_column(
            Layout(self._header(), size=1), Layout(name="body"), Layout(self._footer(), size=1, name="footer")
        )
        layout["body"].split_row(Layout(self._requests(height - 4), ratio=5), Layout(name="right", ratio=4))
        layout["right"].split_column(
            Layout(self._training(height - 17), size=height - 14),
            Layout(self._speed(), size=6),
            Layout(self._memory(), size=6),
        )
        return _Fixed(layout, height)

    def _header(self) -> RenderableType:
        model: ModelInfo = self._model
        elapsed = min(self._session.clock(), self._duration)
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column()
        row.add_column(justify="right")
        row.add_column(width=20 if self._console.width >= 100 else 8)
        title = Text.assemble(
            ("flexcore ", "bold"), (self._name, "bold cyan"), (f"  {model.dtype}, {model.device}, ", "dim"),
            (f"{model.num_threads} threads", "dim"),
        )  # fmt: skip
        bar = ProgressBar(total=self._duration, completed=elapsed, complete_style="cyan", finished_style="cyan")
        row.add_row(title, Text(f"{elapsed:.0f} of {self._duration:.0f} s", "dim"), bar)
        return row

    def _footer(self) -> RenderableType:
        report = self._session.last
        return Text.assemble(
            (" step ", "dim"), (f"{self._session.steps} ", "bold"), (report.explain if report else "", "yellow")
        )

    def _requests(self, height: int) -> RenderableType:
        visits = self._session.visits
        shown = max(1, height // _LINES_A_VISIT)
        running = [visit for visit in visits if not visit.finished]
        done = [visit for visit in visits if visit.finished]
        chosen = (done[-(shown - len(running)) :] if len(running) < shown else []) + running[-shown:]
        width = max(20, self._console.width * 5 // 9 - 4)
        lines = [line for visit in chosen for line in _visit_lines(visit, width)]
        title = f"[bold]requests[/]  {len(running)} running, {len(done)} answered"
        return Panel(Group(*lines), title=title, title_align="left", border_style="cyan")

    def _training(self, height: int) -> RenderableType:
        losses = self._session.losses
        width = max(20, self._console.width * 4 // 9 - 12)
        if losses:
            text = Text("\n".join(chart(losses, width, max(3, height))), style="green", no_wrap=True)
            summary = f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
        else:
            text, summary = Text("first optimizer step ...", "dim"), ""
        head = Text.assemble(("adapter ", "dim"), (f"v{self._session.version}  ", "bold green"), summary)
        return Panel(Group(head, text), title="[bold]finetuning[/]  loss", title_align="left", border_style="green")

    def _speed(self) -> RenderableType:
        session, slo = self._session, self._session.llm.slo
        served, trained = session.rates()
        latencies = Latencies.of(session.visits)
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "[cyan]served[/]", f"[bold]{served:6.0f}[/] tok/s", _latency("TTFT", latencies.ttft_ms, slo.ttft_ms)
        )
        table.add_row(
            "[green]trained[/]", f"[bold]{trained:6.0f}[/] tok/s", _latency("TPOT", latencies.tpot_ms, slo.tpot_ms)
        )
        report = session.last
        if report:
            timing = f"step {report.elapsed_ms:.0f} ms (predicted {report.predicted_ms:.0f})"
            table.add_row("[dim]both[/]", f"[dim]{served + trained:6.0f} tok/s[/]", f"[dim]{timing}[/]")
        return Panel(table, title="[bold]speed[/]  p50 / p99 of objective", title_align="left", border_style="yellow")

    def _memory(self) -> RenderableType:
        pools = {name: count for name, count in self._session.llm.engine.memory().items() if count}
        total = sum(pools.values()) or 1
        width = max(20, self._console.width * 4 // 9 - 6)
        bar = Text()
        legend = Text()
        for name, count in sorted(pools.items(), key=lambda item: -item[1]):
            colour = _POOL_COLOURS.get(name, "white")
            bar.append("█" * max(1, round(width * count / total)), colour)
            legend.append("■ ", colour).append(f"{name} {format_bytes(count)}  ")
        bar.truncate(width)
        title = f"[bold]memory[/]  {format_bytes(total)}"
        return Panel(Group(bar, legend), title=title, title_align="left", border_style="blue")


class _Fixed:
    """A layout that is as high as it was told, so that the picture does not jump."""

    def __init__(self, layout: Layout, height: int) -> None:
        self._layout, self._height = layout, height

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from console.render(self._layout, options.update_height(self._height))


def _visit_lines(visit: Visit, width: int) -> list[Text]:
    """A question, and the last of what was answered so far, in a fixed number of lines."""
    mark = ("✓ ", "green") if visit.finished else ("● ", "bold cyan")
    label = f" docstrings@v{visit.version}" if visit.adapter else ""
    question = " ".join(visit.question.split())
    room = width - 2 - len(label)
    question = question if len(question) <= room else question[: room - 1] + "…"
    head = Text.assemble(mark, (question, "bold" if not visit.finished else ""), (label, "green"), no_wrap=True)
    answer = " ".join((visit.answer.output.text if visit.answer else "").split())
    body = width - 2
    rows = _LINES_A_VISIT - 1
    wrapped = textwrap.wrap(answer, body)[-rows:]
    style = "dim" if visit.finished else ""
    return [head, *(Text("  " + line, style, no_wrap=True) for line in wrapped + [""] * (rows - len(wrapped)))]


def _latency(name: str, values: list[float], objective: float) -> str:
    if not values:
        return f"{name} [dim]-[/]"
    low, high = percentile(values, 50), percentile(values, 99)
    colour = "green" if high <= objective else "red"
    return f"{name} [bold]{low:.0f}[/] / [{colour}]{high:.0f}[/] of {objective:.0f} ms"
