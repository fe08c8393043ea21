"""The co-serving benchmark on a virtual clock: machines that are not here, by their step times."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flexcore
from flexcore import InvalidArgument
from flexcore.bench._client import Visit
from flexcore.bench._sharing import TWO_ENGINES, Finetuning, Run, Step
from flexcore.bench._traces import Arrival

PREFIX = "step_time_ms."


@dataclass(frozen=True)
class Profile:
    """A model on a machine. `step_time_ms`: the terms of Engine.stats(), those under step_time_ms."""

    name: str
    step_time_ms: Mapping[str, float]
    num_layers: int
    num_blocks: int = 1 << 14
    block_size: int = 16
    max_tokens: int = 8192  # of a sequence
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_finetune_tokens_in_flight: int = 8192
    noise: float = 0.0  # standard deviation of the logarithm of a step's time
    device: str = "simulated"

    @classmethod
    def of(cls, engine: flexcore.Engine, config: flexcore.EngineConfig) -> Profile:
        """What an engine knows of itself now."""
        model, stats = engine.model(), engine.stats()
        return cls(
            name=engine.model_directory.name,
            step_time_ms={key[len(PREFIX) :]: value for key, value in stats.items() if key.startswith(PREFIX)},
            num_layers=model.num_layers,
            num_blocks=model.num_blocks,
            block_size=model.block_size,
            max_tokens=model.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_finetune_tokens_in_flight=1024,
        )

    def slower(self, factor: float) -> Profile:
        return replace(self, step_time_ms={name: factor * value for name, value in self.step_time_ms.items()})


# FlexLLM's profile, in the data of its published plots (arXiv 2402.18789, artifact), by reading: decode only 46.5 ms;
# with forward tokens of finetuning 52.2 + 0.269 a token; with a backward layer of 1,024 tokens 52.9 + 5.26.
PROFILES = {
    "llama-70b-4xa100": Profile(
        name="Llama 70B",
        step_time_ms={
            "any_forward": 46.5,
            "prefill_tokens": 0.269,
            "any_finetune": 5.7,
            "finetune_tokens": 0.269,
            "backward_layer_tokens": 5.26 / 1024,
            "backward_units": 0.7,
        },
        num_layers=80,
        device="four A100, simulated",
    )
}


def profile(name: str) -> Profile:
    """One of PROFILES, or a JSON file with the fields of Profile (the engine's file of step times has them but
    num_layers)."""
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.exists():
        raise InvalidArgument(f"--simulate: got {name!r}, wanted a JSON file, or one of {', '.join(PROFILES)}")
    try:
        fields = json.loads(path.read_text())
        known = {key: value for key, value in fields.items() if key in Profile.__dataclass_fields__}
        return Profile(**{"name": path.stem, **known})
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"--simulate: {path}: {error}") from None


class Simulated:
    """A Place. Two engines are each given half of the machine: steps take twice as long, of both for `separate`; with
    `spatial`, finetuning's only while the other is at work."""

    def __init__(
        self, profile: Profile, slo: flexcore.SLO, finetuning: Finetuning, min_finetune_share: float | None = None
    ):
        self._profile, self._slo, self._finetuning = profile, slo, finetuning
        self._floor = min_finetune_share
        self.max_tokens = profile.max_tokens

    def check(self, policy: str) -> None:
        if policy not in TWO_ENGINES:
            self._simulate(self._profile, policy, [], 0.0, jobs=0)

    def describe(self) -> dict[str, Any]:
        return {
            "flexcore": flexcore.__version__,
            "cpu": "",
            "cores": os.cpu_count(),
            "threads": 0,
            "device": self._profile.device,
            "dtype": "",
            "model": self._profile.name,
            "step_time_ms": dict(self._profile.step_time_ms),
        }

    def run(self, policy: str, arrivals: Sequence[Arrival], seconds: float) -> Run:
        if policy not in TWO_ENGINES:
            jobs = 0 if policy == "inference-only" else self._finetuning.jobs
            result = self._simulate(self._profile, policy, arrivals, seconds, jobs)
            return _as_run(result, arrivals, seconds, self._profile.num_layers)
        half = self._profile.slower(2.0)
        run = _as_run(self._simulate(half, "inference-only", arrivals, seconds, 0), arrivals, seconds, half.num_layers)
        tuning = self.run("finetune-only", [], seconds)
        share = 0.5 if policy == "separate" else 1.0 - run.busy_share / 2
        run.finetune_forward_tokens_per_s = share * tuning.finetune_forward_tokens_per_s
        run.finetune_tokens_per_s = share * tuning.finetune_tokens_per_s
        run.trained_tokens_per_s = share * tuning.trained_tokens_per_s
        return run

    def _simulate(
        self, machine: Profile, policy: str, arrivals: Sequence[Arrival], seconds: float, jobs: int
    ) -> flexcore.Simulation:
        engine = flexcore.EngineConfig(
            slo=self._slo,
            policy=policy,
            block_size=machine.block_size,
            max_num_seqs=machine.max_num_seqs,
            max_num_batched_tokens=machine.max_num_batched_tokens,
        )
        if self._floor is not None:
            engine.min_finetune_share = self._floor
        config = flexcore.SimulationConfig(
            engine=engine,
            num_layers=machine.num_layers,
            num_blocks=machine.num_blocks,
            max_finetune_tokens_in_flight=machine.max_finetune_tokens_in_flight,
            step_time_ms=dict(machine.step_time_ms),
            noise=machine.noise,
            duration_ms=1000 * seconds,
        )
        requests = [flexcore.SimulatedRequest(1000 * a.at, a.prompt_tokens, a.output_tokens) for a in arrivals]
        job = flexcore.SimulatedJob([self._finetuning.train_len], self._finetuning.batch_size)
        return flexcore.simulate(requests, [job] * jobs, config)


def _as_run(result: flexcore.Simulation, arrivals: Sequence[Arrival], seconds: float, num_layers: int) -> Run:
    run = Run(seconds)
    for arrival, tokens in zip(arrivals, result.answers["token_ms"], strict=True):
        run.visits.append(Visit(arrival.at, arrival.prompt_tokens, list(tokens / 1000), done=True))
    columns = result.steps
    for k in range(len(columns["begin_ms"])):
        backward = columns["backward_layer_tokens"][k] / num_layers
        run.steps.append(
            Step(
                end=(columns["begin_ms"][k] + columns["elapsed_ms"][k]) / 1000,
                elapsed_ms=columns["elapsed_ms"][k],
                predicted_ms=columns["predicted_ms"][k],
                predicted_upper_ms=columns["predicted_upper_ms"][k],
                decode_tokens=int(columns["decode_rows"][k]),
                prefill_tokens=int(columns["prefill_tokens"][k]),
                finetune_tokens=(columns["finetune_tokens"][k] + backward) / 2,
            )
        )
    # Finetuning ends at `seconds`, or a step later.
    over = max(seconds, max((step.end for step in run.steps if step.finetune_tokens), default=0.0)) or 1.0
    run.finetune_forward_tokens_per_s = result.finetune_tokens / over
    run.finetune_tokens_per_s = (result.finetune_tokens + result.backward_layer_tokens / num_layers) / 2 / over
    run.trained_tokens_per_s = result.trained_tokens / over
    serving = sum(s.elapsed_ms for s in run.steps if s.decode_tokens + s.prefill_tokens and s.end <= seconds)
    run.busy_share = serving / (1000 * seconds) if seconds else 0.0
    return run
