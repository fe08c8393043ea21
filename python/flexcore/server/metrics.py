"""/metrics in Prometheus' text form: vLLM's names and buckets under the prefix flexcore:, and what only a server that
trains has. The page's numbers come from here too."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexcore._core import StepReport
from flexcore.outputs import Answer
from flexcore.server.runner import Stream
from flexcore.ui import percentile

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNT = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
_N = (1, 2, 5, 10, 20)
_LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _TTFT),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _TOKEN),
    "request_time_per_output_token_seconds": ("Mean over an answer's tokens after the first.", _TOKEN),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _REQUEST),
    "request_queue_time_seconds": ("From arrival to the first step that works on it.", _REQUEST),
    "request_prefill_time_seconds": ("From there to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST),
    "request_inference_time_seconds": ("Prefill and decode.", _REQUEST),
    "request_prompt_tokens": ("Tokens of the prompt.", _COUNT),
    "request_generation_tokens": ("Tokens of the answer.", _COUNT),
    "request_params_max_tokens": ("max_tokens.", _COUNT),
    "request_params_n": ("n.", _N),
}
_STEPS = {
    "iteration_tokens_total": ("Tokens of requests in a step.", _ITERATION),
    "iteration_finetune_tokens": ("Finetuning tokens in a step: forward, and backward through all layers.", _ITERATION),
}
_WINDOW = 15.0  # seconds that the page's rates look back
_KEPT = 256  # answers that its quantiles look back


@dataclass
class Engine:
    """The engine's state at a scrape."""

    stats: dict[str, float]
    memory: dict[str, int]
    adapters: list[tuple[str, bool]]  # name, trains
    jobs: dict[str, int]  # by status
    losses: dict[str, float]  # of jobs that run
    job_tokens: dict[str, int]
    job_steps: dict[str, int]


class Metrics(Collector):
    """Observes steps and answers on the event loop."""

    def __init__(self, model_name: str, trains: Callable[[], bool]) -> None:
        """`trains`: whether some job could use a step."""
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self.engine: Engine | None = None  # set before a scrape
        self.throttled_seconds = 0.0
        self._trains = trains
        self.explain = ""
        self._steps: deque[tuple[float, float, float, float]] = deque()  # end, seconds, served, trained
        self._ttft: deque[float] = deque(maxlen=_KEPT)
        self._tpot: deque[float] = deque(maxlen=_KEPT)
        names = list(self._labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"flexcore:{name}", text, names, buckets=buckets, registry=self.registry)
            return made.labels(**self._labels)

        self._histograms = {name: histogram(name, *rest) for name, rest in {**_HISTOGRAMS, **_STEPS}.items()}
        self.lag = histogram("event_loop_lag_seconds", "How late the event loop wakes up.", _LAG)
        self._finished = Counter(
            "flexcore:request_success", "Answers that ended.", [*names, "finished_reason"], registry=self.registry
        )
        self._rejected = Counter(
            "flexcore:admission_rejections", "Requests that were refused.", [*names, "reason"], registry=self.registry
        )
        self.registry.register(self)

    # On the event loop

    def step(self, report: StepReport, end: float) -> None:
        served = report.num_decode_tokens + report.num_prefill_tokens
        trained = (report.num_finetune_forward_tokens + report.num_finetune_backward_tokens) / 2
        busy = report.num_finetune_forward_tokens + report.num_backward_units
        seconds = report.elapsed_ms / 1000
        if served + busy == 0:
            return
        self._histograms["iteration_tokens_total"].observe(served)
        self._histograms["iteration_finetune_tokens"].observe(2 * trained)
        if not busy and self._trains():
            self.throttled_seconds += seconds
        self.explain = report.explain
        self._steps.append((end, seconds, len(report.outputs), trained))
        while self._steps and self._steps[0][0] < end - _WINDOW:
            self._steps.popleft()

    def answered(self, stream: Stream, answer: Answer) -> None:
        output, times = answer.output, stream.token_times[answer.output.index]
        self._finished.labels(**self._labels, finished_reason=output.finish_reason or "").inc()
        observe = {name: self._histograms[name].observe for name in _HISTOGRAMS}
        observe["request_prompt_tokens"](stream.prompt_tokens)
        observe["request_generation_tokens"](len(output.token_ids))
        observe["request_params_max_tokens"](stream.sampling.max_tokens)
        observe["request_params_n"](stream.sampling.n)
        if not times:
            return
        queue = output.queue_ms / 1000
        first, last = times[0] - stream.arrival, times[-1] - stream.arrival
        observe["time_to_first_token_seconds"](first)
        observe["e2e_request_latency_seconds"](last)
        observe["request_queue_time_seconds"](queue)
        observe["request_prefill_time_seconds"](max(0.0, first - queue))
        observe["request_decode_time_seconds"](last - first)
        observe["request_inference_time_seconds"](max(0.0, last - queue))
        self._ttft.append(1000 * first)
        if len(times) > 1:
            tpot = (last - first) / (len(times) - 1)
            observe["request_time_per_output_token_seconds"](tpot)
            self._tpot.append(1000 * tpot)
            for before, after in itertools.pairwise(times):
                observe["inter_token_latency_seconds"](after - before)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(**self._labels, reason=reason).inc()

    def snapshot(self) -> dict[str, Any]:
        """Of the last seconds, for the page."""
        now = time.perf_counter()
        recent = [step for step in self._steps if step[0] >= now - _WINDOW]
        span = max(1e-3, min(_WINDOW, now - (recent[0][0] - recent[0][1]))) if recent else _WINDOW

        def quantiles(values: deque[float]) -> dict[str, float] | None:
            return {f"p{q}": percentile(list(values), q) for q in (50, 99)} if values else None

        return {
            "served_tokens_per_s": sum(step[2] for step in recent) / span,
            "trained_tokens_per_s": sum(step[3] for step in recent) / span,
            "ttft_ms": quantiles(self._ttft),
            "tpot_ms": quantiles(self._tpot),
            "explain": self.explain,
        }

    # A scrape

    def text(self, engine: Engine) -> bytes:
        self.engine = engine
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself."""
        if self.engine is None:
            return
        stats, names, values = self.engine.stats, list(self._labels), list(self._labels.values())

        def gauge(name: str, text: str, value: float) -> Metric:
            family = GaugeMetricFamily(f"flexcore:{name}", text, labels=names)
            family.add_metric(values, value)
            return family

        def counter(name: str, text: str, value: float) -> Metric:
            family = CounterMetricFamily(f"flexcore:{name}", text, labels=names)
            family.add_metric(values, value)
            return family

        def by(family: Any, label: dict[str, float]) -> Metric:
            for key, value in label.items():
                family.add_metric([*values, key], value)
            return family  # type: ignore[no-any-return]

        def families(kind: Any, name: str, text: str, label: str) -> Any:
            return kind(f"flexcore:{name}", text, labels=[*names, label])

        get = stats.get
        yield gauge("num_requests_running", "Requests that have pages.", get("requests_running", 0))
        yield gauge("num_requests_waiting", "Requests in line.", get("requests_waiting", 0))
        blocks = get("kv_blocks", 0)
        used = 1 - get("kv_blocks_free", 0) / blocks if blocks else 0
        yield gauge("kv_cache_usage_perc", "Share of pages in use; 1 is all.", used)
        yield counter("prompt_tokens", "Prefill tokens.", get("prompt_tokens", 0))
        yield counter("generation_tokens", "Tokens of answers.", get("generation_tokens", 0))
        yield counter("num_preemptions", "Requests that gave their pages back.", get("preemptions", 0))
        yield counter("prefix_cache_queries", "Tokens looked for.", get("prefix_cache_queries", 0))
        yield counter("prefix_cache_hits", "Tokens found.", get("prefix_cache_hits", 0))
        yield by(families(GaugeMetricFamily, "memory_bytes", "By tag.", "tag"), dict(self.engine.memory))
        yield by(families(GaugeMetricFamily, "finetune_jobs", "By status.", "status"), dict(self.engine.jobs))
        yield by(families(GaugeMetricFamily, "finetune_loss", "Of the last step.", "job"), self.engine.losses)
        tokens, steps = self.engine.job_tokens, self.engine.job_steps
        yield by(families(CounterMetricFamily, "finetune_tokens", "Trained.", "job"), dict(tokens))
        yield by(families(CounterMetricFamily, "finetune_steps", "Optimizer steps.", "job"), dict(steps))
        rate = self.snapshot()["trained_tokens_per_s"]
        yield gauge("finetune_tokens_per_second", f"Over the last {_WINDOW:.0f} seconds.", rate)
        throttled = "In steps that left finetuning nothing while a job ran."
        yield counter("finetune_throttled_seconds", throttled, self.throttled_seconds)
        classes = sorted(
            name[len("slo.") : -len(".requests")]
            for name in stats
            if name.startswith("slo.") and name.endswith(".requests")
        )
        violations = CounterMetricFamily(
            "flexcore:slo_violations", "Requests that missed an objective.", labels=[*names, "slo_class", "kind"]
        )
        for slo_class in classes:
            for kind in ("ttft", "tpot"):
                missed = stats[f"slo.{slo_class}.requests"] - stats[f"slo.{slo_class}.kept_{kind}"]
                violations.add_metric([*values, slo_class, kind], missed)
        yield violations
        lora = GaugeMetricFamily(
            "flexcore:lora_requests_info", "Adapters that are loaded.", labels=[*names, "lora", "training"]
        )
        for name, trains in self.engine.adapters:
            lora.add_metric([*values, name, str(trains).lower()], 1)
        yield lora
