"""What a client of the engine sees of a run, in the keys of `vllm bench serve`."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexcore import SLO
from flexcore.ui import percentile


@dataclass
class Visit:
    """A request from its arrival to its last token; seconds on one clock."""

    arrival: float
    prompt_tokens: int
    times: list[float] = field(default_factory=list)  # of its tokens
    done: bool = False
    output_tokens: int | None = None  # when `times` are of pieces of text
    text: str = ""
    error: str = ""

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.times[0] - self.arrival)

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first; 0 when there is only one."""
        return 1000 * (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def tokens(self) -> int:
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def gaps_ms(self) -> list[float]:
        return [1000 * (b - a) for a, b in itertools.pairwise(self.times)]

    def keeps(self, slo: SLO) -> bool:
        return self.done and self.ttft_ms <= slo.ttft_ms and self.tpot_ms <= slo.tpot_ms


def summary(visits: Sequence[Visit], seconds: float, slo: SLO) -> dict[str, float]:
    """Of all requests that arrived: who has no answer at the end has not kept its objective."""
    done = [visit for visit in visits if visit.done]
    kept = sum(visit.keeps(slo) for visit in done)
    inputs, outputs = sum(v.prompt_tokens for v in done), sum(v.tokens for v in done)
    result = {
        "duration": seconds,
        "num_prompts": len(visits),
        "completed": len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "request_goodput": kept / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "attainment": kept / len(visits) if visits else 1.0,
    }
    series = {
        "ttft": [visit.ttft_ms for visit in done],
        "tpot": [visit.tpot_ms for visit in done if visit.tokens > 1],
        "itl": [gap for visit in done for gap in visit.gaps_ms],
        "e2el": [1000 * (visit.times[-1] - visit.arrival) for visit in done],
    }
    for name, values in series.items():
        if values:
            result[f"mean_{name}_ms"] = statistics.fmean(values)
            result[f"median_{name}_ms"] = percentile(values, 50)
            result[f"std_{name}_ms"] = statistics.pstdev(values)
            result[f"p99_{name}_ms"] = percentile(values, 99)
    return result
