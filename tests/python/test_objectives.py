"""Objectives by class, policies, and what the engine says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import flexcore as fc

GREEDY = fc.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def load(model: Path, **fields: object) -> fc.Engine:
    return fc.Engine(model, fc.EngineConfig(device="cpu", max_model_len=64, max_num_seqs=4, num_threads=2, **fields))


def drain(engine: fc.Engine) -> list[fc.TokenEvent]:
    events = []
    while engine.has_work():
        events += engine.step().outputs
    return events


def test_the_default_class_has_no_name(numpy_model: Path) -> None:
    with pytest.raises(fc.InvalidArgument, match='slo_classes: "default"'):
        load(numpy_model, slo_classes={"default": fc.SLO(1, 1)})
    with pytest.raises(fc.InvalidArgument, match='slo_class: "default"'):
        load(numpy_model).set_slo(fc.SLO(1, 1), "default")


def test_requests_are_held_to_the_objective_of_their_class(numpy_model: Path) -> None:
    classes = {"batch": fc.SLO(1e6, 1e6), "never": fc.SLO(1e-6, 1e-6)}
    engine = load(numpy_model, slo=fc.SLO(1e6, 1e6), slo_classes=classes)
    engine.submit([1, 2, 3], GREEDY)
    engine.submit_batch([[4, 5], [6, 7]], GREEDY, slo_class="batch")
    engine.submit([8], GREEDY, slo_class="never")
    drain(engine)
    stats = engine.stats()
    for name, requests, kept in (("default", 1, 1), ("batch", 2, 2), ("never", 1, 0)):
        assert (stats[f"slo.{name}.requests"], stats[f"slo.{name}.kept"]) == (requests, kept), name
    engine.set_slo(fc.SLO(1e6, 1e6), "never")
    engine.set_slo(fc.SLO(1e6, 1e-6), "new")
    engine.submit([8], GREEDY, slo_class="never")
    engine.submit([8], GREEDY, slo_class="new")
    drain(engine)
    stats = engine.stats()
    assert stats["slo.never.kept"] == 1
    assert (stats["slo.new.kept"], stats["slo.new.kept_tpot"], stats["slo.new.kept_ttft"]) == (0, 1, 0)


def test_a_request_that_ends_early_counts_by_the_tokens_that_it_got(numpy_model: Path) -> None:
    engine = load(numpy_model, slo=fc.SLO(1e6, 1e6))
    engine.cancel(engine.submit([1, 2], GREEDY))  # before its first token: nothing was kept or broken
    drain(engine)
    assert engine.stats().get("slo.default.requests", 0) == 0
    request = engine.submit([1, 2], GREEDY)
    while not engine.step().outputs:
        pass
    assert engine.cancel(request)
    drain(engine)
    stats = engine.stats()
    assert (stats["slo.default.requests"], stats["slo.default.kept"], stats["requests_cancelled"]) == (1, 1, 2)


def test_time_before_submission_counts_to_the_first_token(numpy_model: Path) -> None:
    engine = load(numpy_model)
    engine.submit([1, 2, 3], GREEDY, waited_ms=3_600_000.0)
    assert drain(engine)[0].ttft_ms > 3_600_000.0
    with pytest.raises(fc.InvalidArgument, match=r"waited_ms: -1"):
        engine.submit([1], GREEDY, waited_ms=-1.0)


def test_policies_change_while_the_engine_runs(numpy_model: Path) -> None:
    engine = load(numpy_model, policy="inference-only", slo=fc.SLO(1e6, 1e6))
    engine.create_adapter("a", fc.LoraConfig(r=2))
    ids = list(range(1, 20))
    job = engine.finetune("a", [fc.Example(ids, ids)] * 4, fc.FinetuneConfig(batch_size=2))
    request = engine.submit([1, 2, 3], GREEDY)
    assert [event.request_id for event in drain(engine)] == [request] * 5
    assert engine.job(job).step == 0
    engine.set_policy("finetune-only")
    engine.submit([1, 2, 3], GREEDY)
    while engine.job(job).status != "succeeded":
        assert not engine.step().outputs
    assert len(drain(engine)) == 5
    with pytest.raises(fc.InvalidArgument, match=r'policy: "fair", wanted hybrid, temporal:N'):
        engine.set_policy("fair")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "temporal"}, 'policy: "temporal"'),
        ({"min_finetune_share": 1.5}, "min_finetune_share: 1.5"),
        ({"slo": fc.SLO(attainment=1.0)}, "slo: attainment 1"),
        ({"slo_classes": {"": fc.SLO()}}, "slo_classes"),
        ({"slo_classes": {"x": fc.SLO(tpot_ms=0)}}, r'slo_classes\["x"\]: tpot_ms 0'),
        ({"slo_classes": {"x": 3}}, "wanted a flexcore.SLO"),
    ],
)
def test_bad_objectives_are_refused(numpy_model: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(fc.InvalidArgument, match=message):
        load(numpy_model, **fields)


def test_a_class_that_is_none_is_refused(numpy_model: Path) -> None:
    engine = load(numpy_model)
    with pytest.raises(fc.InvalidArgument, match='slo_class: "fast" is not one of slo_classes'):
        engine.submit([1], GREEDY, slo_class="fast")


def test_the_explain_line_gives_the_reason(numpy_model: Path) -> None:
    engine = load(numpy_model, slo=fc.SLO(1e6, 1e6))
    engine.create_adapter("a", fc.LoraConfig(r=2))
    ids = list(range(1, 20))
    engine.finetune("a", [fc.Example(ids, ids)])
    assert engine.step().explain.endswith("nobody waits")
    engine.set_slo(fc.SLO(1e-3, 1e6))
    engine.submit([1, 2, 3], GREEDY)
    lines = []
    while engine.has_work():
        lines.append(engine.step().explain)
    assert any("behind" in line for line in lines), lines
