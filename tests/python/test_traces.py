"""Traces from their files and made ones, and what a client makes of a run."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest

import flexcore as fc
from flexcore.bench import _traces
from flexcore.bench._client import Visit, summary
from flexcore.bench._traces import Arrival

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 100, "output_length": 6, "hash_ids": [0]}
{"timestamp": 2500, "input_length": 30, "output_length": 4, "hash_ids": [1]}
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (AZURE, [(0.0, 374, 44), (4.314579, 396, 109)]),
        (BURST, [(0.0, 472, 18), (113.0, 417, 276)]),
        (MOONCAKE, [(0.0, 100, 6), (2.5, 30, 4)]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_published_traces(tmp_path: Path, text: str, wanted: list[tuple], packed: bool) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    rows = _traces.read(path)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [row[1:] for row in wanted]
    assert [row.at for row in rows] == pytest.approx([row[0] for row in wanted], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"has the columns \['a', 'b'\]"),
        (AZURE + "2023-11-16 18:15:50.9,many,3\n", "line 4"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
    ],
)
def test_broken_traces_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(fc.InvalidArgument, match=message):
        _traces.read(path)
    with pytest.raises(fc.InvalidArgument, match="cannot be read"):
        _traces.read(tmp_path / "none.csv")


def test_scaled_traces_have_the_rate_and_fit() -> None:
    trace = [Arrival(10.0 * i, 1000 + i, 200) for i in range(50)]
    rows = _traces.scaled(trace, rate=8.0, seconds=20.0, lengths=0.1, most_tokens=110)
    assert len(rows) == 160  # the trace three times and a bit
    assert rows[0].at == 0 and 19 < rows[-1].at < 20
    assert all(a.at <= b.at for a, b in itertools.pairwise(rows))
    assert {row.output_tokens for row in rows} == {20}
    assert all(row.prompt_tokens == 90 for row in rows)  # 100 to 105, cut


def test_poisson_and_bursts_have_their_rates() -> None:
    rows = _traces.poisson(20.0, 100.0, (3, 9), (2, 4), seed=5)
    assert 1850 < len(rows) < 2150
    assert {row.prompt_tokens for row in rows} == set(range(3, 10))
    more = _traces.burst(rows, 40.0, 60.0, 3.5, seed=5)
    inside = [sum(40 <= row.at < 60 for row in these) for these in (rows, more)]
    assert inside[1] == pytest.approx(3.5 * inside[0], rel=0.05)
    assert len(more) - len(rows) == inside[1] - inside[0]


def test_a_client_counts_what_vllm_counts() -> None:
    slo = fc.SLO(tpot_ms=100.0, ttft_ms=500.0)
    visits = [
        Visit(1.0, 10, [1.2, 1.3, 1.4], done=True),
        Visit(2.0, 20, [2.6, 2.7], done=True),  # the first token late
        Visit(3.0, 5, [3.1, 3.4], done=True),  # the second one
        Visit(4.0, 5, [4.1]),  # no end
        Visit(5.0, 5, [5.1], done=True),
    ]
    result = summary(visits, 10.0, slo)
    assert (result["num_prompts"], result["completed"], result["attainment"]) == (5, 4, 2 / 5)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (40, 8)
    assert result["request_goodput"] == pytest.approx(0.2)
    assert result["median_ttft_ms"] == pytest.approx(150.0)
    assert result["mean_tpot_ms"] == pytest.approx((100 + 100 + 300) / 3)
    assert result["mean_itl_ms"] == pytest.approx((100 + 100 + 100 + 300) / 4)
    assert result["mean_e2el_ms"] == pytest.approx((400 + 700 + 400 + 100) / 4)
    assert summary([], 10.0, slo)["attainment"] == 1.0
